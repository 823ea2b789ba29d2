"""Recorded routing as a value: which experts the tokens of some sequences visited, and with which weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.policy import Rows, Visit


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One sequence. The first `n_prompt` of its `T` tokens are the prompt, the others were made."""

    name: str
    """Name of the text: a domain, a request."""
    n_prompt: int
    experts: NDArray[np.int16]
    """`[T, L, K]`; -1 stands for no expert."""
    weights: NDArray[np.float16] | None = None
    """`[T, L, K]`: the router's weight of each visit."""
    ahead: NDArray[np.int16] | None = None
    """`[T, L, K]`: experts that a look-ahead from the layer before expected; all -1 in the first layer."""


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """Recordings of one model."""

    model: str
    n_experts: tuple[int, ...]
    """Number of experts by layer."""
    recordings: tuple[Recording, ...]


def visits(recordings: Sequence[Recording], chunk_tokens: int = 512) -> Iterator[Visit]:
    """Yield the visits of sequences that run one after the other: prompts in chunks, then a token a step."""
    for recording in recordings:
        start = 0
        while start < len(recording.experts):
            stop = min(start + chunk_tokens, recording.n_prompt) if start < recording.n_prompt else start + 1
            step = recording.experts[start:stop]
            for layer in range(step.shape[1]):
                yield layer, count_rows(step[:, layer]), stop - start
            start = stop


RECALL = 0.75
"""Share of a look-ahead's guesses that come true, over the layers of the demo model (bench/lookahead.py)."""
SPREAD = 0.15
"""How much more often the first guess comes true, and less often the last: 0.91 and 0.60 there."""


def guesses(experts: NDArray[np.int16], recall: float = RECALL, seed: int = 0) -> NDArray[np.int16]:
    """Return a made-up look-ahead, `[T, L, K]` and likeliest first, right in a share `recall` of its guesses.

    In place of a wrong one there is an expert that another token of the sequence visited in that layer, as popular
    but not visited now; or -1 where that token's was visited.
    """
    random = np.random.default_rng([seed, 2])
    n_tokens, n_layers, top_k = experts.shape
    experts = random.permuted(experts, axis=2)
    others = experts[random.integers(0, max(n_tokens, 1), (n_tokens, n_layers)), np.arange(n_layers)]  # [T, L, K]
    spread = min(SPREAD, recall, 1.0 - recall) if top_k > 1 else 0.0  # the share stays what was asked for
    right = recall + np.linspace(spread, -spread, top_k)
    wrong = random.random(experts.shape) >= right
    known = (others[..., :, None] == experts[..., None, :]).any(axis=-1)
    ahead = np.where(wrong, np.where(known, -1, others), experts)
    ahead[:, 0] = -1
    return ahead


def count_rows(visited: NDArray[np.int16]) -> Rows:
    """Return (expert, n_rows) of a layer's visits, `[T, K]`; -1 is left out."""
    experts, counts = np.unique(visited[visited >= 0], return_counts=True)
    return tuple(zip(experts.tolist(), counts.tolist(), strict=True))


Ids = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of visits that were to experts of a given set."""

    share: float
    chance: float
    """The same for experts drawn at random."""
    by_layer: tuple[float | None, ...]
    """The share in each layer; `None` where nothing was to be compared."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields."""
        return {"share": self.share, "chance": self.chance, "by_layer": list(self.by_layer)}


def recurrence(routing: RoutingTrace) -> Share | None:
    """Return how many of a token's experts its predecessor visited too; `None` where no token has one."""
    return _share(routing, [(r.experts[1:], r.experts[:-1]) for r in routing.recordings])


def foreseen(routing: RoutingTrace) -> Share | None:
    """Return how many visits the look-ahead expected, where there was one; `None` without any."""
    return _share(routing, [(r.experts, r.ahead) for r in routing.recordings if r.ahead is not None])


def _share(routing: RoutingTrace, pairs: Iterable[tuple[Ids, Ids]]) -> Share | None:
    """Return how many visits `[T, L, K]` are among the `others` `[T, L, K]` of their token, where it has others."""
    counted = np.zeros((3, len(routing.n_experts)))
    for visits, others in pairs:
        asked = (others >= 0).any(-1, keepdims=True) & (visits >= 0)
        found = (visits[..., :, None] == others[..., None, :]).any(-1) & asked
        by_chance = asked.sum(-1) * (others >= 0).sum(-1) / np.array(routing.n_experts)
        counted += [found.sum((0, 2)), asked.sum((0, 2)), by_chance.sum(0)]
    n_found, n_asked, n_by_chance = counted
    if not n_asked.any():
        return None
    by_layer = tuple(float(f / n) if n else None for f, n in zip(n_found, n_asked, strict=True))
    return Share(float(n_found.sum() / n_asked.sum()), float(n_by_chance.sum() / n_asked.sum()), by_layer)
