"""A simulated accelerator: a second arena in RAM behind a link, with the CPU's own numbers.

In wall time the link is throttled, so copies, experts and evictions race as they do on a GPU. In virtual time the
copy is a plain one, and `lanes.virtual` accounts for its time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fiddler.devices.arena import Arena, Views
from fiddler.types import ExpertWeights

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
