"""Predicts seconds: of experts, copies and the dense part, and of lanes that share bandwidth."""
