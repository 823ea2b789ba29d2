"""Simulates machines, compares policies and systems, and replays recorded routing; the engine does not need it."""
