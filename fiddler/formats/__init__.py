"""Quantised weights: how each published format stores them, and the one form in which they are computed with."""
