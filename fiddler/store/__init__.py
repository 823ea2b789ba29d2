"""Holds the checkpoint's bytes: tensor names to (layer, expert, part), and experts' weights on the host."""
