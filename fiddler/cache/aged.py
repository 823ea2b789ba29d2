"""Counts that forget: every row weighs half as much after each half-life of tokens."""

import math
from collections.abc import Mapping

from fiddler.cache.history import History
from fiddler.cache.keys import Key, Rows
from fiddler.cache.saved import number, table

_LOG_LIMIT = 64.0  # of a count: far above any real one, far below what overflows


class AgedCounts:
    """Rows per expert, each weighing 2^(-age / half_life), its age in tokens of its own layer's clock.

    Kept as base-2 logarithms of the count *inflated* by 2^(clock / half_life): ageing then changes no stored
    number, the order within a layer holds between touches, and nothing overflows or needs rescaling.
    """

    def __init__(self, history: History, half_life: float) -> None:
        self.half_life = half_life
        self._history = history
        self._logs = [[-math.inf] * n for n in history.n_experts]
        self._decays: dict[int, float] = {}

    def observe(self, layer: int, rows: Rows, n_tokens: int) -> None:
        """Add one visit, after the history recorded it."""
        logs = self._logs[layer]
        now = self.inflation(layer)
        decay = self._mean_decay(n_tokens)
        for expert, n_rows in rows:
            old, new = logs[expert], now + math.log2(n_rows * decay)
            low, high = (old, new) if old < new else (new, old)
            logs[expert] = high + math.log2(1.0 + math.exp2(low - high))

    def _mean_decay(self, n_tokens: int) -> float:
        """What a row of a chunk weighs: (1/T)·Σ_{i<T} 2^(-i/H), since its place in the chunk is not known."""
        if n_tokens not in self._decays:
            ratio = -math.expm1(-n_tokens * math.log(2) / self.half_life)
            self._decays[n_tokens] = ratio / -math.expm1(-math.log(2) / self.half_life) / n_tokens
        return self._decays[n_tokens]

    def inflated(self, key: Key) -> float:
        """The stored logarithm: comparable within a layer, unchanged until a touch; -inf if never touched."""
        return self._logs[key[0]][key[1]]

    def inflation(self, layer: int) -> float:
        """What to subtract from the layer's `inflated` to get the logarithm of the aged count now."""
        return self._history.layer_tokens(layer) / self.half_life

    def count(self, key: Key) -> float:
        """The aged count now, in rows: comparable between layers."""
        return math.exp2(self._logs[key[0]][key[1]] - self.inflation(key[0]))

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
        logs = table(state, "logs", self._history.n_experts, blank=-math.inf)
        for layer, row in enumerate(logs):
            # exactly 0 for the half-life it was saved with, so that a restored cache names the same victims
            clock = self._history.layer_tokens(layer)
            if max(row, default=0.0) - clock / saved_half_life > _LOG_LIMIT:
                raise ValueError("saved counts are beyond reason")
            shift = clock / self.half_life - clock / saved_half_life
            logs[layer] = [log + shift for log in row]
        self._logs = logs
