"""What the Triton kernels of plain and of quantised weights share."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.stack import StackedMatrix

TILE_ROWS = 16
"""Rows of a tile, unless no group has more than one. Source: `mma.m16n8k16`, in the PTX ISA's "Warp-level Matrix
Instructions", multiplies no fewer at a time. A group of up to so many rows reads its weights once."""
WARPS = 4
STAGES = 3
"""Turns of the loop over `tl.dot` that are under way: one multiplies while the others' tiles come to shared memory
(Triton, `tl.range`). The largest tiles of plain weights take 40 KiB of it; the smallest GPUs with bfloat16 have 99
for a block (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", 8.6 and 8.9)."""


class Tile(NamedTuple):
    """What one program multiplies in one turn of its loop; powers of two."""

    rows: int
    out: int
    """Rows of the weight `[out, in]`."""
    inner: int
    """Columns of the weight."""


class Matrix(NamedTuple):
    """A matrix `[n_slots, out, in]` and its bias `[n_slots, out]`.

    With a twin, which lies in memory as the matrix does, `silu(x Wᵀ + b) * (x Vᵀ + c)` is computed.
    """

    weight: StackedMatrix
    twin: StackedMatrix | None
    bias: Tensor | None
    twin_bias: Tensor | None


@triton.jit
def plus(a, b):
    """Return the sum of two partial sums."""
    return a + b


@triton.jit
def visited(
    positions, first, stop, top_k, gather: tl.constexpr, scatter: tl.constexpr, tile_rows: tl.constexpr
):  # fmt: skip
    """Return for rows from `first` on whether each is before `stop`, its row of `x` and its row of the results."""
    rows = first + tl.arange(0, tile_rows)
    taken = rows < stop
    at = tl.load(positions + rows, mask=taken, other=0) if gather or scatter else rows
    return taken, (at // top_k if gather else rows).to(tl.int64), (at if scatter else rows).to(tl.int64)


@triton.jit
def finish(total, bias, places, there, tile_rows: tl.constexpr, axis: tl.constexpr):
    """Return the sums `[rows, out]`, with the bias; those of one row are summed up along `axis` first."""
    if tile_rows == 1:
        total = tl.reduce(total, axis, plus)[None, :]
    if bias is not None:
        total += tl.load(bias + places, mask=there, other=0.0).to(tl.float32)[None, :]
    return total
