"""The words all of the cache shares."""

from collections.abc import Sequence

Key = tuple[int, int]
"""An expert: (layer, index in the layer)."""

Rows = Sequence[tuple[int, int]]
"""One visit to a layer: (expert, n_rows) pairs, each expert once, n_rows > 0."""
Visit = tuple[int, Rows, int]
"""One layer of one step: (layer, ((expert, n_rows), …), n_tokens)."""
