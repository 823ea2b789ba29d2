"""Decides where experts run. Plain Python: no torch, no clock, no threads."""
