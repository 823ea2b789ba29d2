"""Requests in, tokens out: the engine thread, its steps, and the public face."""
