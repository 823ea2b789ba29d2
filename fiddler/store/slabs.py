"""Memory for what is made once and kept, apart from what is made on the way and freed.

To repack an expert takes temporaries of several times its size. Where kept tensors lie between them on one heap,
that heap grows: GPTQ's experts took 2.7 times their bytes, and NF4's 1.8 times (measured with glibc 2.36).
"""

import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fiddler.store.layout import BlockLayout
from fiddler.types import ExpertWeights

SLAB_BYTES = 64 << 20
"""Bytes of a slab. A page takes memory once it is written to."""


@dataclass(slots=True)
class Slabs:
    """Blocks that are cut from slabs, one behind the other; a slab lives as long as any of its blocks."""

    _left: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8, device="cpu"))
    """What is left of the last slab, uint8 `[n]`."""

    def kept(self, made: ExpertWeights) -> ExpertWeights:
        """Return a copy of an expert's weights in a block of a slab."""
        layout = BlockLayout.of(made)
        if len(self._left) < layout.nbytes:
            self._left = _slab(max(SLAB_BYTES, layout.nbytes))
        block, self._left = self._left[: layout.nbytes], self._left[layout.nbytes :]
        layout.write(made, block)
        return layout.views(block)


def _slab(n_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)
