"""Copies pageable memory to the GPU through pinned pieces, in turn.

While the GPU copies one piece, the host fills the next: the double buffering of pageable transfers (CUDA C++ Best
Practices Guide, "Pinned Memory" and "Asynchronous and Overlapping Transfers with Computation"). The driver stages
such a copy too, but makes the host wait for it (CUDA Runtime API, "API synchronization behavior").
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fiddler.gpu.device import Event, Gpu

N_PIECES = 4
"""One is filled and one is copied; the others keep the link busy while this thread sleeps or is not scheduled."""

PIECE_BYTES = 2 << 20
"""A block takes its bytes and one piece's (the first overlaps nothing) at the host's rate, and a fixed time for
every piece. The sum is least where a piece is sqrt(block bytes * rate * time): 1 to 3 MB for blocks of 9 to 50 MB
(as in Qwen3-30B-A3B and gpt-oss-20b), a host that copies some 12 GB/s and 10 us to launch a copy from Python.
"""

POLL_S = 50e-6
"""Seconds between two polls of an event. Meanwhile the link copies the other pieces: 6 MiB, 100 us at 64 GB/s."""


class StagingRing:
    """`n_pieces` pinned pieces, for one thread.

    `sleep` is given `POLL_S` whenever every piece is still being copied. Raises `RuntimeError` where there is no
    pinned memory.
    """

    def __init__(
        self,
        gpu: Gpu,
        *,
        n_pieces: int = N_PIECES,
        piece_bytes: int = PIECE_BYTES,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._link = gpu.link
        self._sleep = sleep
        with torch.inference_mode(False):  # or a thread that is not in inference mode could not write
            self._pieces = gpu.pinned(n_pieces, piece_bytes, dtype=torch.uint8)
        self._copied: list[Event | None] = [None] * n_pieces
        """By piece, the point on the link behind the last copy out of it."""
        self._turn = 0

    def copy(self, block: Tensor, to: Tensor) -> None:
        """Queue a copy of a pageable block on the link; both uint8 `[n]`.

        When this returns the block has been read, and `to` is whole once the link has done the work queued so far.
        Raises `ValueError` for other sizes, and the GPU's errors; part of the block may then be on its way.
        """
        if block.shape != to.shape:
            raise ValueError(f"a block of {tuple(block.shape)} bytes does not fit {tuple(to.shape)}")
        piece_bytes = self._pieces.shape[1]
        for run, place in zip(block.split(piece_bytes), to.split(piece_bytes), strict=True):
            self._send(run, place)

    def _send(self, run: Tensor, to: Tensor) -> None:
        """Copy bytes that fit into one piece."""
        turn = self._turn
        self._wait(turn)
        piece = self._pieces[turn, : len(run)]
        piece.copy_(run)
        self._turn = (turn + 1) % len(self._copied)
        try:
            self._link.run(partial(to.copy_, piece, non_blocking=True))
        finally:  # a launch that failed may have got as far as the GPU
            self._copied[turn] = self._link.mark()

    def _wait(self, turn: int) -> None:
        """Poll: waiting for the stream would also wait for work that others queue meanwhile."""
        copied = self._copied[turn]
        while copied is not None and not copied.done():
            self._sleep(POLL_S)
