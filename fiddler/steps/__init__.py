"""Runs forwards of packed rows, layer by layer."""
