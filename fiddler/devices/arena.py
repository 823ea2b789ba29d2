"""A device's memory for experts: equal slots in one allocation, each holding one block at a time.

`SimDevice` is an accelerator made of an arena in RAM behind a link, with the CPU's own numbers. In wall time the
link is throttled, so copies, experts and evictions race as they do on a GPU. In virtual time the copy is a plain
one, and `lanes.virtual` accounts for its time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fiddler.formats.packed import tensors
from fiddler.types import ExpertWeights

ALIGNMENT = 64
"""Bytes: blocks keep in a slot the alignment they have on the host."""


class Views(Protocol):
    """Finds the weights in a block; compared by identity."""

    @property
    def reads(self) -> bool:
        """Whether the views depend on a block's content, as a factor does: they are made anew for each block."""
        ...

    def views(self, block: Tensor) -> ExpertWeights:
        """Return the weights in a block, without copying."""


class Arena:
    """`n_slots` slots of `slot_bytes` each, uint8, in the memory of `device`.

    It knows neither the contents of a slot nor its readers: a writer must make sure that there are none. Raises
    `ValueError` for slots that would not be aligned, and torch's `RuntimeError` where there is no memory.
    """

    def __init__(self, n_slots: int, slot_bytes: int, device: torch.device | None = None) -> None:
        if slot_bytes % ALIGNMENT:
            raise ValueError(f"slots of {slot_bytes} bytes are not aligned to {ALIGNMENT}")
        self._device = device
        self._allocate(n_slots, slot_bytes)

    def shrink(self, n_slots: int, reclaim: Callable[[], None]) -> None:
        """Reduce the number of slots, which must hold nothing.

        `reclaim` gives the old memory back before the new is taken.
        """
        slot_bytes = self.slot_bytes
        self._views.clear()
        del self._slots
        reclaim()
        self._allocate(n_slots, slot_bytes)

    def _allocate(self, n_slots: int, slot_bytes: int) -> None:
        with torch.inference_mode(False):  # or a thread that is not in inference mode could not write
            # torch aligns to 64 bytes, on a GPU to 512
            self._slots = torch.empty(n_slots, slot_bytes, dtype=torch.uint8, device=self._device)
        # The last layout only: another one means that another block has been written over those views.
        self._views: list[tuple[Views, ExpertWeights] | None] = [None] * n_slots

    @property
    def n_slots(self) -> int:
        """Slots, whatever they hold."""
        return self._slots.shape[0]

    @property
    def slots(self) -> Tensor:
        """All slots, uint8 `[n_slots, slot_bytes]`."""
        return self._slots

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest block that fits."""
        return self._slots.shape[1]

    def write(self, slot: int, block: Tensor) -> None:
        """Copy a block, uint8 of at most `slot_bytes`, into a slot.

        From pinned memory to a GPU it is queued on the current stream, and the host goes on. Raises `IndexError`
        for a slot that does not exist and `ValueError` for a block that is too large.
        """
        to = self._slot(slot)
        if block.numel() > self.slot_bytes:
            raise ValueError(f"a block of {block.numel()} bytes does not fit a slot of {self.slot_bytes}")
        kept = self._views[slot]
        if kept is not None and kept[0].reads:
            self._views[slot] = None
        to[: block.numel()].copy_(block, non_blocking=True)

    def views(self, slot: int, layout: Views) -> ExpertWeights:
        """Return the weights in a slot, kept as long as it is asked for with the same layout.

        They are views: later writes to the slot show in them, unless the layout reads blocks. Raises `IndexError`
        for a slot that does not exist.
        """
        found = self._views[slot] if 0 <= slot < len(self._views) else None
        if found is None or found[0] is not layout:
            found = self._views[slot] = layout, layout.views(self._slot(slot))
        return found[1]

    def check(self) -> None:
        """Raise `AssertionError` unless slots are aligned and every view kept lies within its own slot."""
        assert self._slots.data_ptr() % ALIGNMENT == 0 == self.slot_bytes % ALIGNMENT
        for slot, kept in enumerate(self._views):
            start = self._slots.data_ptr() + slot * self.slot_bytes
            weights = () if kept is None else kept[1].parts
            for part in (part for matrix in weights for part in tensors(matrix)):
                assert start <= part.data_ptr() <= start + self.slot_bytes - part.nbytes, f"slot {slot}"

    def _slot(self, slot: int) -> Tensor:
        if not 0 <= slot < self.n_slots:
            raise IndexError(f"slot {slot} of {self.n_slots}")
        return self._slots[slot]


LINK_BYTES_PER_S = 4e9
"""A quarter of PCIe 3.0 x16: slow beside any CPU's memory, so that races are wide."""


@dataclass(frozen=True, slots=True)
class SimDevice:
    """Slots in RAM. `link_bytes_per_s` is the throttle; `None` copies as fast as memory does."""

    arena: Arena
    block: Callable[[int, int], Tensor]
    """(layer, expert) to its block on the host, `[n]` bytes."""
    layout: Callable[[int], Views]
    """By layer, the layout of a block."""
    link_bytes_per_s: float | None = LINK_BYTES_PER_S

    def copy(self, layer: int, expert: int, slot: int) -> None:
        """Copy an expert's block into a slot, at the speed of the link."""
        started = time.perf_counter()
        block = self.block(layer, expert)
        self.arena.write(slot, block)
        if self.link_bytes_per_s is not None:
            left_s = block.nbytes / self.link_bytes_per_s - (time.perf_counter() - started)
            time.sleep(max(left_s, 0.0))

    def weights(self, layer: int, slots: Sequence[int]) -> list[ExpertWeights]:
        """Return the weights in slots as experts of `layer`."""
        layout, found = self.layout(layer), []
        for slot in slots:
            found.append(self.arena.views(slot, layout))
        return found
