"""Runs the dense part and experts on a GPU."""
