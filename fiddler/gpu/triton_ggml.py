"""GGUF's blocks of codes and scales as numbers, in Triton; formats/ggml.py says where a block has what.

Codes are read in pieces of 16 bytes: in every type the low halves of a piece have one scale, and so have its high
halves. Then the halves go where their columns are, as runs of low halves and of high ones take turns. Everything is
read by bytes, for blocks of 17 bytes start at odd addresses.
"""

from typing import NamedTuple, Self

import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.stack import StackedMatrix
from fiddler.gpu.triton_codes import float16, scale_values, unit, values
from fiddler.gpu.triton_tiles import TILE_ROWS, Tile

PIECE = tl.constexpr(16)
"""Bytes of codes with a scale, or with two."""


class Blocks(NamedTuple):
    """What a kernel is compiled for; all `None` for a plain matrix."""

    kind: str | None = None
    block_columns: int | None = None
    block_bytes: int | None = None

    @classmethod
    def of(cls, matrix: StackedMatrix) -> Self:
        """Return what a matrix is made of. Scales elsewhere than in blocks are left to triton_packed.py."""
        if isinstance(matrix, Tensor) or (run := matrix.code.run) is None:
            return cls()
        return cls(matrix.code.value, run.columns, run.nbytes)


def block_tile(most_rows: int, item: int) -> Tile:
    """Return the tile for the rows of the largest group, and bytes of their numbers.

    128 columns hold a run of every type. Seen when compiled: twice the columns for one row take fewer instructions
    a weight, and all the registers; for more rows of float32 there are none left.
    """
    if most_rows <= 1:
        return Tile(1, 8, 256)
    return Tile(TILE_ROWS, 32 if item == 2 else 8, 128)


# Numbers are those of formats/ggml.py to the bit: no product here has more bits than a float32, so nothing changes
# where one is fused with a sum.
@triton.jit
def block_numbers(
    rows, there, start, n_inner, kind: tl.constexpr, columns: tl.constexpr, nbytes: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    """Return `tile` columns from `start` on of rows of blocks, float32 `[rows, tile]`.

    `rows` are addresses. Rows that are not `there`, and columns from `n_inner` on, are not read, and are zeros.
    `start` is a multiple of `tile`, which is a power of two: at least 128 for Q6_K, 64 for others.
    """
    halves: tl.constexpr = 1 if kind == "q8_0" else 2
    each: tl.constexpr = PIECE * halves
    per: tl.constexpr = columns // each
    pieces = start // each + tl.arange(0, tile // each)
    held = there[:, None] & (pieces < n_inner // each)[None, :]
    blocks = rows[:, None] + (pieces // per * nbytes)[None, :]
    at = (pieces % per)[None, :]
    first_code: tl.constexpr = (
        0 if kind == "q6_k" else 1 if kind == "mxfp4" else 16 if kind == "q4_k" else 48 if kind == "q5_k" else 2
    )
    codes = _piece(blocks + first_code + at * PIECE, held)
    numbers = _half(codes, blocks, at, held, 0, kind)
    if halves == 2:
        run: tl.constexpr = 64 if kind == "q6_k" else 32 if columns == 256 else 16
        shape: tl.constexpr = [held.shape[0], tile // (2 * run), run]
        high = _half(codes, blocks, at, held, 1, kind)
        both = tl.join(tl.reshape(numbers, shape), tl.reshape(high, shape))
        numbers = tl.permute(both, (0, 1, 3, 2))
    return tl.reshape(numbers, [held.shape[0], tile])


@triton.jit
def _half(codes, blocks, at, held, side: tl.constexpr, kind: tl.constexpr):
    """Return the numbers of low (`side` 0) or high halves of pieces `at` of their blocks, `[rows, pieces, 16]`."""
    n = codes if kind == "q8_0" else (codes >> (4 * side)) & 15
    if kind == "q5_k":
        fifth = _piece(blocks + 16 + at % 2 * PIECE, held)
        n |= ((fifth >> (at // 2 * 2 + side)[:, :, None]) & 1) << 4
    if kind == "q6_k":
        upper = _piece(blocks + 128 + at // 4 * 32 + at % 2 * PIECE, held)
        n |= ((upper >> (side * 4 + at % 4 // 2 * 2)[:, :, None]) & 3) << 4
    if kind == "mxfp4":
        number = values(n, 0.0, n, "fp4") * unit("fp4") * scale_values(_byte(blocks, held), "e8m0")[:, :, None]
    elif kind == "q4_0":
        number = values(n, 8.0, n, "int4") * _float(blocks, held)[:, :, None]
    elif kind == "q8_0":
        number = values(n, 128.0, n, "int8") * _float(blocks, held)[:, :, None]
    elif kind == "q6_k":
        scale = _byte(blocks + 192 + at // 4 * 8 + side * 4 + at % 4, held)
        scale = values(scale, 128.0, n, "int8") * _float(blocks + 208, held)
        number = values(n, 32.0, n, "int4") * scale[:, :, None]
    else:
        scale, minimum = _six_bits(blocks, at // 2 * 2 + side, held)
        number = values(n, 0.0, n, "int4") * scale[:, :, None] - minimum[:, :, None]
    return number


@triton.jit
def _six_bits(blocks, group, held):
    """Return the scales and minima of groups of 32 columns, Q4_K's and Q5_K's: see `_scaled` of formats/ggml.py."""
    places, later = blocks + 4 + group % 4, group >= 4
    first, second, third = _byte(places, held), _byte(places + 4, held), _byte(places + 8, held)
    scale = tl.where(later, (third & 15) | (first >> 6 << 4), first & 63)
    minimum = tl.where(later, (third >> 4) | (second >> 6 << 4), second & 63)
    return (
        values(scale, 0.0, scale, "int4") * _float(blocks, held),
        values(minimum, 0.0, minimum, "int4") * _float(blocks + 2, held),
    )


@triton.jit
def _float(at, held):
    """Return the float16 numbers at addresses, perhaps odd ones, in float32."""
    return float16(_byte(at, held) | (_byte(at + 1, held) << 8))


@triton.jit
def _byte(at, held):
    """Return the bytes at addresses, int32."""
    return tl.load(at, mask=held, other=0).to(tl.int32)


@triton.jit
def _piece(at, held):
    """Return the bytes of pieces from addresses on, int32 `[rows, pieces, 16]`."""
    places = at[:, :, None] + tl.arange(0, PIECE)[None, None, :]
    return tl.load(places, mask=held[:, :, None], other=0).to(tl.int32)
