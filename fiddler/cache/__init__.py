"""Decides which experts hold a slot: history, policies, slots. Plain numbers; no tensor is touched."""
