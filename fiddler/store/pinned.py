"""Experts' blocks in pieces that can be locked into RAM, and how much of them is.

A GPU copies by itself only what cannot be paged out. `cudaHostRegister` (CUDA Runtime API, "Memory Management")
locks memory that is there already, so a block is never in host memory twice. It locks whole pages, and to register
one again is an error (`cudaErrorHostMemoryAlreadyRegistered`): pieces share none. A copy must lie in one
registration or in none (CUDA Driver API, `cuMemcpy`; else `CUDA_ERROR_INVALID_VALUE`): no block is in two pieces.
"""

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from fiddler.store.block import ALIGNMENT

PAGE_BYTES = mmap.PAGESIZE
"""What the system locks at least: 4 KiB on x86, up to 64 KiB on Arm."""

PIECE_BYTES = 256 << 20
"""What is locked at once at most, unless one block is more.

A refusal keeps what was locked before it and leaves up to a piece of what could have been. That is little beside a
model, and beside limits that are met (Docker on WSL2: 500 MB in all; microsoft/WSL, issue 14078); a few hundred
registrations in turn are nothing beside locking their pages.
"""


@dataclass(frozen=True, slots=True)
class Pinned:
    """Which blocks are locked: of each layer its first experts."""

    n_bytes: int
    """Of the blocks that are locked."""
    total_bytes: int
    """Of all blocks."""
    experts: tuple[int, ...]
    """By layer, how many."""

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert's block is locked, and with it every byte of it."""
        return expert < self.experts[layer]


def cut(n_blocks: int, block_bytes: int, piece_bytes: int = PIECE_BYTES) -> list[int]:
    """Return how many blocks each piece has: what fits `piece_bytes`, at least one; only the last has fewer."""
    most = max(piece_bytes // block_bytes, 1)
    full, rest = divmod(n_blocks, most)
    return [most] * full + [rest] * (rest > 0)


def on_pages(n_blocks: int, block_bytes: int) -> Tensor:
    """Return memory for blocks, uint8 `[n_blocks, block_bytes]`, that starts a page; less than two are wasted.

    Its last page is all its own: of memory that shares a page with what is locked, CUDA copies neither kind.
    """
    n_bytes = n_blocks * block_bytes
    whole = -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
    room = torch.empty(whole + PAGE_BYTES - ALIGNMENT, dtype=torch.uint8)  # torch aligns to 64 bytes
    start = -room.data_ptr() % PAGE_BYTES
    return room[start : start + n_bytes].view(n_blocks, block_bytes)
