"""Memory for what is made once and kept, apart from what is made on the way and freed.

To repack an expert takes temporaries of several times its size. Where kept tensors lie between them on one heap, that
heap grows: GPTQ's experts took 2.7 times their bytes, and NF4's 1.8 times (measured with glibc 2.36).
"""

import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

SLAB_BYTES = 64 << 20
"""Bytes of a slab. A page takes memory once it is written to."""


@dataclass(slots=True)
class Slabs:
    """Blocks that are cut from slabs, one behind the other; a slab lives as long as any of its blocks."""

    _left: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8, device="cpu"))
    """What is left of the last slab, uint8 `[n]`."""

    def block(self, n_bytes: int) -> Tensor:
        """Return memory of zeros, uint8 `[n_bytes]`; it is aligned as blocks are where all sizes are multiples."""
        if len(self._left) < n_bytes:
            self._left = _slab(max(SLAB_BYTES, n_bytes))
        block, self._left = self._left[:n_bytes], self._left[n_bytes:]
        return block


def _slab(n_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)
