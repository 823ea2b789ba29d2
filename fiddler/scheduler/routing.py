"""Routing as plain integers: which rows of a step visit which expert of a layer."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """The rows of one expert in one layer: `order[start:stop]` of its `LayerWork`."""

    expert: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Visits of tokens to this expert."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer's loads, experts ascending.

    `order` lists positions in the flattened `[T, K]` routing, grouped by expert and ascending within one;
    position `p` is token `p // K`'s visit number `p % K`. Positions that visit nobody are absent.
    """

    layer: int
    loads: tuple[Load, ...]
    order: tuple[int, ...]


def route(layer: int, experts: Sequence[int], n_experts: int, weights: Sequence[float] | None = None) -> LayerWork:
    """Group a flattened `[T, K]` routing by expert.

    Dropped, since they add nothing: ids outside `0 … n_experts-1` (routers mark padding and identity experts
    so) and, where `weights` are given, visits of weight zero.
    """
    rows: dict[int, list[int]] = {}
    for position, expert in enumerate(experts):
        if 0 <= expert < n_experts and (weights is None or weights[position] != 0.0):
            rows.setdefault(expert, []).append(position)
    loads: list[Load] = []
    order: list[int] = []
    for expert in sorted(rows):
        start = len(order)
        order += rows[expert]
        loads.append(Load(expert, start, len(order)))
    return LayerWork(layer, tuple(loads), tuple(order))
