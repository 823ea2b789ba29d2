"""Measures kernels, experts, dense parts and copies on this machine."""
