"""Turns the rows of a step into forwards, layer by layer."""
