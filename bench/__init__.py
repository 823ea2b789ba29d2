"""Measurements, each printed beside the limit of the machine that sets it."""
