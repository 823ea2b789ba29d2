"""The expert with the fewest rows goes: of all time, or weighed by age."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from fiddler.cache.aged import AgedCounts
from fiddler.cache.history import History
from fiddler.cache.keys import Key, Rows
from fiddler.cache.worth import Policy


class Lfu(Policy):
    """Score: rows since the beginning."""

    name: ClassVar[str] = "lfu"

    def __init__(self, history: History) -> None:
        self.history = history

    def rank(self, key: Key) -> float:
        """The same as the score."""
        return self.history.n_rows(key)


class AgedLfu(Policy):
    """Score: rows, each halved for every `half_life` tokens its layer has seen since."""

    name: ClassVar[str] = "aged-lfu"

    def __init__(self, history: History, half_life: float = 32.0) -> None:
        self.history = history
        self.counts = AgedCounts(history, half_life)

    def observe(self, layer: int, rows: Rows, n_tokens: int, scores: Sequence[float] | None = None) -> None:
        """Add the visit's rows."""
        self.counts.observe(layer, rows, n_tokens)

    def rank(self, key: Key) -> float:
        """The inflated count, which ageing does not touch."""
        return self.counts.inflated(key)

    def level(self, layer: int) -> float:
        """By how many half-lives the layer's counts are inflated."""
        return self.counts.inflation(layer)

    def score(self, key: Key) -> float:
        """The aged count."""
        return self.counts.count(key)

    def rate(self, key: Key) -> float:
        """The aged count over the tokens it stands for: the mean life of a visit, half-life / ln 2."""
        return self.counts.count(key) * math.log(2) / self.counts.half_life

    def state(self) -> dict[str, object]:
        """The aged counts."""
        return self.counts.state()

    def restore(self, state: Mapping[str, object]) -> None:
        """The aged counts; a state of another half-life is converted."""
        self.counts.restore(state)
