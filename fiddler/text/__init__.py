"""Turns prompts into tokens, in a process of their own, and tokens into text."""
