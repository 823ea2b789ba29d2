"""Which experts a wave will visit in its next layer: guesses, likeliest first."""

from itertools import pairwise
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.cache import ExpertCache
from fiddler.cache.keys import Rows
from fiddler.scheduler.messages import LayerReady

MANY = 64
"""Waves whose latest layer is kept: far more than there are at a time."""


class Predictor(Protocol):
    """Sees every `LayerReady`, in the order in which they come."""

    name: ClassVar[str]

    def expects(self, ready: LayerReady) -> Rows:
        """Return (expert, n_rows) guesses for the layer after this one; none where it knows nothing."""
        ...


class Nobody:
    """Guesses nothing."""

    name: ClassVar[str] = "off"

    def expects(self, ready: LayerReady) -> Rows:
        """Nothing."""
        return ()


class LookAhead:
    """What the next layer's router says of this layer's rows; the model's side computes it."""

    name: ClassVar[str] = "look-ahead"

    def expects(self, ready: LayerReady) -> Rows:
        """What came with the event."""
        return ready.ahead


class Frequency:
    """The next layer's experts by what the cache holds them to be worth; as many as the wave visits now."""

    name: ClassVar[str] = "frequency"

    def __init__(self, cache: ExpertCache) -> None:
        self._cache = cache

    def expects(self, ready: LayerReady) -> Rows:
        """The dearest, with one row each."""
        layer = ready.work.layer + 1
        n_experts = self._cache.history.n_experts
        if layer == len(n_experts):
            return ()
        worth = {expert: self._cache.score((layer, expert)) for expert in range(n_experts[layer])}
        best = sorted((e for e in worth if worth[e] > 0.0), key=lambda e: -worth[e])
        return [(expert, 1) for expert in best[: len(ready.work.loads)]]


class Transitions:
    """How often a visit to one expert went with a visit to another, a layer on."""

    name: ClassVar[str] = "transitions"

    def __init__(self, cache: ExpertCache) -> None:
        n_experts = cache.history.n_experts
        self._counts: list[NDArray[np.float32]] = [np.zeros(pair, np.float32) for pair in pairwise(n_experts)]
        """By layer, `[E, E of the next]`."""
        self._latest: dict[int, tuple[int, NDArray[np.float32]]] = {}  # by wave: its layer, and rows by expert

    def expects(self, ready: LayerReady) -> Rows:
        """The experts that went most often with those visited now, as many as are visited now."""
        layer, loads = ready.work.layer, ready.work.loads
        before = self._latest.pop(ready.wave, None)
        if layer and before is not None and before[0] == layer - 1:
            rows = np.zeros(self._counts[layer - 1].shape[1], np.float32)
            rows[[load.expert for load in loads]] = 1.0
            self._counts[layer - 1] += np.outer(before[1], rows)
        if layer == len(self._counts) or not loads:
            return ()
        counts = self._counts[layer]
        now = np.zeros(counts.shape[0], np.float32)
        now[[load.expert for load in loads]] = 1.0
        if len(self._latest) == MANY:  # of waves that were dropped
            self._latest.clear()
        self._latest[ready.wave] = layer, now
        # a row of counts says where its expert's visits went; as shares, frequent experts do not drown the others
        total = np.maximum(counts.sum(axis=1), 1.0)
        chances = (now / total) @ counts
        best = np.argsort(-chances, kind="stable")[: len(loads)].tolist()
        return [(expert, 1) for expert in best if chances[expert] > 0.0]


class Auto:
    """A look-ahead where the model allows it, transition counts where it does not."""

    name: ClassVar[str] = "auto"

    def __init__(self, cache: ExpertCache) -> None:
        self._transitions = Transitions(cache)

    def expects(self, ready: LayerReady) -> Rows:
        """What came with the event, or what usually follows."""
        return ready.ahead or self._transitions.expects(ready)
