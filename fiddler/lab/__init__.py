"""Simulates machines, compares policies and systems, reads recorded routing; the engine does without it."""
