"""The expert touched longest ago goes."""

from typing import ClassVar

from fiddler.cache.history import History
from fiddler.cache.keys import Key
from fiddler.cache.worth import Policy


class Lru(Policy):
    """Score 1 / (visits to any layer since the last touch + 1)."""

    name: ClassVar[str] = "lru"
    by_recency: ClassVar[bool] = True

    def __init__(self, history: History) -> None:
        self.history = history

    def rank(self, key: Key) -> float:
        """The visit that touched the expert last."""
        return self.history.last_visit(key)

    def score(self, key: Key) -> float:
        """As a share, so that hysteresis compares ages."""
        last = self.history.last_visit(key)
        return 1 / (self.history.n_visits - last + 1) if last else 0.0


class LayerLru(Lru):
    """The same with an equal quota for every layer: mixtral-offloading's cache (Eliseev and Mazur, 2023)."""

    name: ClassVar[str] = "layer-lru"
    per_layer: ClassVar[bool] = True
