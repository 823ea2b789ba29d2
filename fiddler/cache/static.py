"""A fixed placement, as in the original Fiddler: the first experts of an order are resident, now and for ever."""

from collections.abc import Sequence
from typing import ClassVar

from fiddler.cache.history import History
from fiddler.cache.keys import Key
from fiddler.cache.worth import Policy


class Static(Policy):
    """Admits the first `n_slots` experts of `order`, so nothing is ever evicted. What routing does is ignored."""

    name: ClassVar[str] = "static"

    def __init__(self, history: History, order: Sequence[Key] | None = None) -> None:
        self.history = history
        order = uniform(history.n_experts) if order is None else order
        self._places = {key: place for place, key in enumerate(order)}

    def rank(self, key: Key) -> float:
        """How many places of the order come after the expert, and itself; 0 for one that is not in it."""
        return len(self._places) - self._places.get(key, len(self._places))

    def admits(self, key: Key, n_slots: int) -> bool:
        """Only the first `n_slots` of the order."""
        return self._places.get(key, n_slots) < n_slots


def uniform(n_experts: Sequence[int]) -> tuple[Key, ...]:
    """An order without knowledge: the first expert of every layer, then the second of every layer, and so on."""
    keys = [(layer, expert) for layer, n in enumerate(n_experts) for expert in range(n)]
    return tuple(sorted(keys, key=lambda key: (key[1], key[0])))


def by_popularity(table: Sequence[Sequence[float]]) -> tuple[Key, ...]:
    """The order of a popularity table [L][E], most popular first; ties as in `uniform`."""
    keys = uniform([len(row) for row in table])
    return tuple(sorted(keys, key=lambda key: -table[key[0]][key[1]]))


def share_of_visits(order: Sequence[Key], n_slots: int, counts: Sequence[Sequence[float]]) -> float:
    """Of visits counted by layer and expert, [L][E], the share that meets the first `n_slots` of `order`.

    That is the hit rate of the placement on a text with these counts. ValueError where nothing was counted.
    """
    total = sum(map(sum, counts))
    if not total:
        raise ValueError("no visits were counted")
    return float(sum(counts[layer][expert] for layer, expert in order[:n_slots]) / total)
