"""Measures what kernels, experts, dense parts and copies take on this machine."""
