"""What recorded routing is like: how often experts recur, and how well a look-ahead saw them coming."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiddler.recording import RoutingTrace

Ids = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Share:
    """Of some visits, how many were to experts of a set."""

    share: float
    chance: float
    """The same for experts drawn at random."""
    by_layer: tuple[float | None, ...]
    """The share in each layer; `None` where nothing was to be compared."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields."""
        return {"share": self.share, "chance": self.chance, "by_layer": list(self.by_layer)}


def recurrence(trace: RoutingTrace) -> Share | None:
    """Return how many of a token's experts its predecessor visited too; `None` where no token has one."""
    return _share(trace, [(r.experts[1:], r.experts[:-1]) for r in trace.recordings])


def foreseen(trace: RoutingTrace) -> Share | None:
    """Return how many visits the look-ahead expected, where there was one; `None` without any."""
    return _share(trace, [(r.experts, r.ahead) for r in trace.recordings if r.ahead is not None])


def _share(trace: RoutingTrace, pairs: Iterable[tuple[Ids, Ids]]) -> Share | None:
    """Return how many visits `[T, L, K]` are among the `others` `[T, L, K]` of their token, where it has others."""
    counted = np.zeros((3, len(trace.n_experts)))
    for visits, others in pairs:
        asked = (others >= 0).any(-1, keepdims=True) & (visits >= 0)
        found = (visits[..., :, None] == others[..., None, :]).any(-1) & asked
        by_chance = asked.sum(-1) * (others >= 0).sum(-1) / np.array(trace.n_experts)
        counted += [found.sum((0, 2)), asked.sum((0, 2)), by_chance.sum(0)]
    n_found, n_asked, n_by_chance = counted
    if not n_asked.any():
        return None
    by_layer = tuple(float(f / n) if n else None for f, n in zip(n_found, n_asked, strict=True))
    return Share(float(n_found.sum() / n_asked.sum()), float(n_by_chance.sum() / n_asked.sum()), by_layer)
