"""An engine's cache policies by name, and those of them that count visits: `aged-lfu`, `lfu` and `lru`."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from fiddler.cache.cache import ExpertCache
from fiddler.cache.forecast import Forecast
from fiddler.cache.policy import History, Key, Policy, Rows, number, table

_LOG_LIMIT = 64.0  # of a count: far above any real one, far below what overflows


class AgedLfu(Policy):
    """Score: rows, each weighing 2^(-age / half_life), its age in tokens of its own layer's clock.

    Kept as base-2 logarithms of the count *inflated* by 2^(clock / half_life): ageing then changes no stored
    number, the order within a layer holds between touches, and nothing overflows or needs rescaling.
    """

    name: ClassVar[str] = "aged-lfu"

    def __init__(self, history: History, half_life: float = 32.0) -> None:
        self.history = history
        self.half_life = half_life
        self._logs = [[-math.inf] * n for n in history.n_experts]
        self._decays: dict[int, float] = {}

    def observe(self, layer: int, rows: Rows, n_tokens: int, scores: Sequence[float] | None = None) -> None:
        """Add one visit, after the history recorded it."""
        logs = self._logs[layer]
        now = self.level(layer)
        decay = self._mean_decay(n_tokens)
        for expert, n_rows in rows:
            old, new = logs[expert], now + math.log2(n_rows * decay)
            low, high = (old, new) if old < new else (new, old)
            logs[expert] = high + math.log2(1.0 + math.exp2(low - high))

    def _mean_decay(self, n_tokens: int) -> float:
        """Return the mean weight of a row in a chunk, (1/T)·Σ_{i<T} 2^(-i/H): its place there is not known."""
        if n_tokens not in self._decays:
            ratio = -math.expm1(-n_tokens * math.log(2) / self.half_life)
            self._decays[n_tokens] = ratio / -math.expm1(-math.log(2) / self.half_life) / n_tokens
        return self._decays[n_tokens]

    def rank(self, key: Key) -> float:
        """The stored logarithm: comparable within a layer, unchanged until a touch; -inf if never touched."""
        return self._logs[key[0]][key[1]]

    def level(self, layer: int) -> float:
        """Return the number to subtract from the layer's ranks to get the logarithm of the aged count now."""
        return self.history.layer_tokens(layer) / self.half_life

    def score(self, key: Key) -> float:
        """The aged count now, in rows: comparable between layers."""
        return math.exp2(self._logs[key[0]][key[1]] - self.level(key[0]))

    def rate(self, key: Key) -> float:
        """The aged count over the tokens it stands for: the mean life of a visit, half-life / ln 2."""
        return self.score(key) * math.log(2) / self.half_life

    def state(self) -> dict[str, object]:
        """JSON-able; null stands for never touched."""
        logs = [[None if log == -math.inf else log for log in layer] for layer in self._logs]
        return {"half_life": self.half_life, "logs": logs}

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state, after the history did: the counts stay, and age at this half-life from now on.

        ValueError, and nothing changed, where the state does not fit.
        """
        saved_half_life = number(state, "half_life")
        if saved_half_life <= 0:
            raise ValueError(f"saved half-life is {saved_half_life}")
        logs = table(state, "logs", self.history.n_experts, blank=-math.inf)
        for layer, row in enumerate(logs):
            # exactly 0 for the half-life it was saved with, so that a restored cache names the same victims
            clock = self.history.layer_tokens(layer)
            if max(row, default=0.0) - clock / saved_half_life > _LOG_LIMIT:
                raise ValueError("saved counts are beyond reason")
            shift = clock / self.half_life - clock / saved_half_life
            logs[layer] = [log + shift for log in row]
        self._logs = logs


class Lfu(Policy):
    """Score: rows since the beginning."""

    name: ClassVar[str] = "lfu"

    def __init__(self, history: History) -> None:
        self.history = history

    def rank(self, key: Key) -> float:
        """Return the score."""
        return self.history.n_rows(key)


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


ADMISSION = 1.0
"""An expert that gives way for one that is demanded may be worth this many times as much."""
STAGED = 64
"""One slot in so many is for experts in passing, where not every expert has one."""

POLICIES: Mapping[str, Callable[[History, float], Policy]] = MappingProxyType(
    {
        AgedLfu.name: AgedLfu,
        Forecast.name: lambda history, half_life: Forecast(history),
        Lfu.name: lambda history, half_life: Lfu(history),
        Lru.name: lambda history, half_life: Lru(history),
    }
)
"""Each is made of a history and a half-life in tokens."""


def n_staging(n_slots: int, n_experts: Sequence[int]) -> int:
    """Return how many of a cache's slots are for experts in passing."""
    return n_slots // STAGED if n_slots < sum(n_experts) else 0


def make_cache(policy: str, n_slots: int, n_experts: tuple[int, ...], *, half_life: float) -> ExpertCache:
    """Return an engine's cache, empty."""
    made = POLICIES[policy](History(n_experts), half_life)
    return ExpertCache(n_slots, n_experts, made, admission=ADMISSION, n_staging=n_staging(n_slots, n_experts))
