"""Every architecture whose experts go through the seam of the installed transformers, tiny and random.

    for name in included():
        model = build(name)

A multimodal model is built with its towers and meant to be given text only. `excluded()` says why the others are
not built. `python -m tests.architectures` prints the table.
"""

from .catalogue import Architecture, Experts, architectures, excluded, included
from .model import build, stateful

__all__ = ["Architecture", "Experts", "architectures", "build", "excluded", "included", "stateful"]
