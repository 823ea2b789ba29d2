"""Fiddler and other systems on the same weights, in turns: what is asked, who runs it, what came of it."""
