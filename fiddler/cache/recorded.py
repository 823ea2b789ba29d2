"""Routing as it happened: which experts the tokens of some sequences visited, and how heavily."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.keys import Rows
from fiddler.cache.replay import Visit


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One sequence. The first `n_prompt` of its `T` tokens are the prompt, the others were made."""

    name: str
    """What it was of: a domain, a request."""
    n_prompt: int
    experts: NDArray[np.int16]
    """`[T, L, K]`; -1 visits nobody."""
    weights: NDArray[np.float16] | None = None
    """`[T, L, K]`: the router's weight of each visit."""
    ahead: NDArray[np.int16] | None = None
    """`[T, L, K]`: what a look-ahead from the layer before had expected; all -1 in the first layer."""


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """Recordings of one model."""

    model: str
    n_experts: tuple[int, ...]
    """By layer."""
    recordings: tuple[Recording, ...]


def visits(recordings: Sequence[Recording], chunk_tokens: int = 512) -> Iterator[Visit]:
    """Yield the visits of sequences that run one after the other: prompts in chunks, then a token a step."""
    for recording in recordings:
        start = 0
        while start < len(recording.experts):
            stop = min(start + chunk_tokens, recording.n_prompt) if start < recording.n_prompt else start + 1
            step = recording.experts[start:stop]
            for layer in range(step.shape[1]):
                yield layer, _rows(step[:, layer]), stop - start
            start = stop


def _rows(visited: NDArray[np.int16]) -> Rows:
    experts, counts = np.unique(visited[visited >= 0], return_counts=True)
    return tuple(zip(experts.tolist(), counts.tolist(), strict=True))
