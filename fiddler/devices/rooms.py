"""Products of few different row counts, for each one that torch multiplies takes memory for good.

oneDNN, which multiplies torch's 16-bit matrices on a CPU, compiles a kernel for every row count of every weight
shape, two thirds of a megabyte each, and keeps the latest 1024 of them for the life of the process. Rows are
therefore multiplied in rooms: `ROOMS` are the only counts there are, and zeros fill up the last room. float32 goes
to MKL, which keeps nothing, and its rows travel as they are.
"""

from bisect import bisect_left
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.base import Matmul

ROOMS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Row counts that are multiplied."""
FEW = 32
"""Up to here a product takes as long as reading its weight takes, and zeros cost nothing."""
MOST_ZEROS = 0.25
"""Of more rows: beyond this share of zeros they go into two rooms, though the weight is then read twice."""


@lru_cache(1 << 12)
def rooms(n_rows: int) -> tuple[int, ...]:
    """Return the rooms that `n_rows` rows (at least one) go into, in order; only the last one may have zeros."""
    if n_rows > ROOMS[-1]:
        return ROOMS[-1], *rooms(n_rows - ROOMS[-1])
    at = bisect_left(ROOMS, n_rows)
    if n_rows <= FEW or ROOMS[at] <= n_rows * (1 + MOST_ZEROS):
        return (ROOMS[at],)
    return ROOMS[at - 1], *rooms(n_rows - ROOMS[at - 1])


def in_rooms(matmul: Matmul, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `matmul(x, weight, bias)`, `[n, out]`, of as many rows at once as there are rooms for."""
    n_rows = x.shape[0]
    if x.dtype == torch.float32 or not n_rows or x.is_cuda:
        return matmul(x, weight, bias)
    sizes = rooms(n_rows)
    if sizes == (n_rows,):
        return matmul(x, weight, bias)
    if zeros := sum(sizes) - n_rows:
        x = F.pad(x, (0, 0, 0, zeros))
    parts = [matmul(part, weight, bias) for part in x.split(sizes)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:n_rows]
