"""Turns prompts into tokens and tokens into text."""
