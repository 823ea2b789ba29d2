"""Rows of a layer by the slot that runs them, and windows of neighbouring slots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

MOST_GROUPS = 1023
"""Groups of one grouped matmul. Source: `group_count < 1024` in `GroupMM.cu`."""


@dataclass(frozen=True, slots=True)
class Visits:
    """Rows of one layer, grouped by the slot that runs them. Slots ascend, each once; a group may be empty."""

    slots: Tensor
    """int32 `[G]`, on the device."""
    bounds: Tensor
    """int32 `[G + 1]`, from 0 to R: group g is `positions[bounds[g]:bounds[g + 1]]`."""
    positions: Tensor
    """int32 `[R]`, in the flattened `[T, K]` routing, each once; a row's token is `position // top_k`."""
    most_rows: int
    """Rows of the largest group."""
    n_rows: int
    """R, the number of rows."""
    top_k: int
    groups: tuple[tuple[int, int, int], ...]
    """(slot, start, stop) by group: the same as `slots` and `bounds`, for the host. `triton` does not read it."""


class Window(NamedTuple):
    """Neighbouring slots and the rows that they run."""

    first_slot: int
    stop_slot: int
    start: int
    stop: int


def windows(groups: Sequence[tuple[int, int, int]], most_slots: int) -> Iterator[Window]:
    """Yield windows of at most so many slots that hold all groups, (slot, start, stop) each, but for empty ones."""
    window: Window | None = None
    for slot, start, stop in groups:
        if start == stop:
            continue
        if window is not None and slot < window.first_slot + most_slots:
            window = window._replace(stop_slot=slot + 1, stop=stop)
            continue
        if window is not None:
            yield window
        window = Window(slot, slot + 1, start, stop)
    if window is not None:
        yield window
