"""Requests in, tokens out: the engine's thread, its loop, its assembly, and the public face."""
