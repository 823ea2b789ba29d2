"""Decides; does nothing else. Plain Python: no torch, no clock, no threads."""
