"""Runs the dense part and experts on an NVIDIA GPU."""
