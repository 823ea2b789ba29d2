"""Computes experts: the formula, the kernels, and one file per device."""
