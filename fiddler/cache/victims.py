"""Finds the worst expert that may give way, by an array minimum, on demand."""

from collections.abc import Callable, Iterable
from math import inf

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.policy import Key, Policy

Place = tuple[float, int, int, int]
"""(worth, recency, id): the smallest is evicted first; the id keeps all places distinct."""


class Victims:
    """Owner of the list of experts that may give way: those in permanent slots that are neither loading nor leased.

    Ranks change with every visit, and few of them are ever asked for. So a visit only marks its layer as stale, and
    a question computes the least worth of the stale layers anew. `spares` says whether a layer may lose a slot to
    another.
    """

    def __init__(self, policy: Policy, spares: Callable[[int], bool]) -> None:
        n_experts = policy.history.n_experts
        self._policy = policy
        self._spares = spares
        self._may_go = [np.zeros(n, dtype=np.bool_) for n in n_experts]
        self._worth: list[NDArray[np.float64]] = [np.full(n, inf) for n in n_experts]
        """By layer, `[E]`: worth of the experts that may be evicted, infinite for the others."""
        self._least = np.full(len(n_experts), inf)
        self.stale: set[int] = set()
        """Layers whose ranks, or whose experts that may give way, are others than when they were looked at last."""

    def put(self, layer: int, experts: Iterable[int], *, may_go: bool) -> None:
        """Take note whether some of a layer's experts may give way."""
        row = self._may_go[layer]
        for expert in experts:
            row[expert] = may_go
        self.stale.add(layer)

    def worst_of(self, layer: int) -> Key | None:
        """Return the worst expert of one layer; `None` where none may give way."""
        self._freshen()
        return self._first(layer) if self._least[layer] < inf else None

    def worst(self) -> Key | None:
        """Return the worst expert of all layers that may lose a slot; `None` where there is none."""
        self._freshen()
        least = self._least
        layer = int(least.argmin())
        if not self._spares(layer):
            least = np.where([self._spares(i) for i in range(len(least))], least, inf)
            layer = int(least.argmin())
        if not least[layer] < inf:
            return None
        tied = (least == least[layer]).nonzero()[0].tolist()
        if len(tied) == 1:
            return self._first(layer)
        return min([self._first(i) for i in tied if self._spares(i)], key=self.place)

    def place(self, key: Key) -> Place:
        """Return an expert's place in the order in which experts give way."""
        layer, expert = key
        worth = self._policy.rank(key) - self._policy.level(layer)
        return worth, self._policy.history.last_visit(key), -expert, -layer

    def check(self, may_go: set[Key]) -> None:
        """Raise `AssertionError` unless these experts may give way, and the worst are those that a search finds."""
        held = {(layer, int(e)) for layer, row in enumerate(self._may_go) for e in np.flatnonzero(row)}
        assert held == may_go, "other experts may give way than are listed"
        for layer in range(len(self._may_go)):
            mine = [key for key in may_go if key[0] == layer]
            assert self.worst_of(layer) == min(mine, key=self.place, default=None), (
                f"layer {layer} has another worst"
            )
        spared = [key for key in may_go if self._spares(key[0])]
        assert self.worst() == min(spared, key=self.place, default=None), "another layer has the worst"

    def _first(self, layer: int) -> Key:
        tied = (self._worth[layer] == self._least[layer]).nonzero()[0].tolist()
        first = tied.pop()
        if tied:  # equal in worth: longest ago, then the higher number
            last_visit = self._policy.history.last_visits(layer)
            for expert in reversed(tied):
                if last_visit[expert] < last_visit[first]:
                    first = expert
        return layer, first

    def _freshen(self) -> None:
        for layer in self.stale:
            worth = self._worth[layer] = np.where(self._may_go[layer], self._policy.worths(layer), inf)
            self._least[layer] = worth[worth.argmin()]  # quicker than its minimum
        self.stale.clear()
