"""Groups a layer's routing by expert, in plain integers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self


class _Rows(NamedTuple):
    expert: int
    start: int
    stop: int
    n_rows: int
    """Visits of tokens to this expert."""


class Load(_Rows):
    """The rows of one expert in one layer: `order[start:stop]` of its `LayerWork`."""

    __slots__ = ()

    def __new__(cls, expert: int, start: int, stop: int) -> Self:
        """Make one; its rows are counted."""
        return super().__new__(cls, expert, start, stop, stop - start)


_load = lru_cache(1 << 12)(Load)
"""Loads of few rows come again and again."""


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer's loads, experts ascending.

    `order` lists positions in the flattened `[T, K]` routing, those of one expert side by side and ascending;
    position `p` is token `p // K`'s visit number `p % K`. Positions without an expert are absent.
    """

    layer: int
    loads: tuple[Load, ...]
    order: tuple[int, ...]
    deferred: tuple[Load, ...] = ()
    """Loads whose results join one layer later, in the same `order`."""

    @property
    def rows(self) -> dict[int, int]:
        """Rows by expert, which may have a load of either kind."""
        rows: dict[int, int] = {}
        if not self.deferred:
            for load in self.loads:
                rows[load.expert] = load.n_rows
            return rows
        for load in (*self.loads, *self.deferred):
            rows[load.expert] = rows.get(load.expert, 0) + load.n_rows
        return rows


def route(
    layer: int, experts: Sequence[int], n_experts: int, weights: Sequence[float] | None = None, *, n_tokens: int = 0
) -> LayerWork:
    """Group a flattened `[T, K]` routing by expert.

    Dropped, since they add nothing: ids outside `0 … n_experts-1` (routers mark padding and identity experts
    so) and, where `weights` are given, visits of weight zero. Where there is but one token, and nothing is dropped,
    rows stay at their positions: nothing has to be put in order before, or back after.
    """
    if n_tokens == 1 and min(experts) >= 0 and max(experts) < n_experts and (weights is None or 0.0 not in weights):
        loads = []
        for expert, position in sorted(zip(experts, range(len(experts)), strict=True)):
            loads.append(_load(expert, position, position + 1))  # a call less, for every layer
        if len(set(experts)) == len(loads):
            return LayerWork(layer, tuple(loads), tuple(range(len(loads))))
    return _grouped(layer, experts, n_experts, weights)


def _grouped(layer: int, experts: Sequence[int], n_experts: int, weights: Sequence[float] | None) -> LayerWork:
    rows: dict[int, list[int]] = {}
    for position, expert in enumerate(experts):
        if 0 <= expert < n_experts and (weights is None or weights[position] != 0.0):
            rows.setdefault(expert, []).append(position)
    loads: list[Load] = []
    order: list[int] = []
    for expert in sorted(rows):
        start = len(order)
        order += rows[expert]
        loads.append(_load(expert, start, len(order)))
    return LayerWork(layer, tuple(loads), tuple(order))


def defer(work: LayerWork, weights: Sequence[float], top_k: int, n_deferred: int) -> LayerWork:
    """Return the work with each token's `n_deferred` visits of least weight as deferred loads, after the others.

    The choice depends on the routing alone, so results do not depend on where experts run. Source of the idea:
    "expert deferral", KTransformers, SOSP 2025.
    """
    late: set[int] = set()
    n_tokens = len(weights) // top_k
    visits = set(work.order)
    for token in range(n_tokens):
        mine = [p for p in range(token * top_k, (token + 1) * top_k) if p in visits]
        late.update(sorted(mine, key=lambda p: (weights[p], -p))[: max(0, min(n_deferred, len(mine) - 1))])
    order: list[int] = []
    parts: list[tuple[Load, ...]] = []
    for wanted in (False, True):
        loads: list[Load] = []
        for load in work.loads:
            rows = [p for p in work.order[load.start : load.stop] if (p in late) is wanted]
            if rows:
                loads.append(Load(load.expert, len(order), len(order) + len(rows)))
                order += rows
        parts.append(tuple(loads))
    return LayerWork(work.layer, parts[0], tuple(order), parts[1])
