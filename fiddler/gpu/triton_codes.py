"""Codes and scales of quantised weights as numbers, in Triton.

No GPU's own types are used: 8-bit floats are made of integers, so that one code serves GPUs with and without them.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.formats.packed import MIDDLE, VALUES, Code
from fiddler.gpu.stack import PackedStack

MOST_PIECE = 16
"""Bytes of codes that a thread reads at once: its widest load."""
INTEGERS = {torch.float32: torch.int64, torch.float16: torch.int32, torch.bfloat16: torch.int32}
"""Integers of two numbers each."""
KINDS = {torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}
"""Scales that are bytes to a kernel."""


class Coding(NamedTuple):
    """What a kernel is compiled for, beside its tile."""

    code: str
    middle: float
    """The value that stands for zero where a matrix has no zeros."""
    kind: str
    """How a scale is stored."""
    places: int
    """Columns to a byte."""
    piece: int
    """Bytes of a row that surely have one scale, a power of two."""
    apart: bool
    """Whether the two columns of a byte may have different scales."""

    @classmethod
    def of(cls, matrix: PackedStack, most: int) -> "Coding":
        """Return the coding for tiles of `most` bytes of a row."""
        assert matrix.scales is not None
        code, per = matrix.code, 8 // matrix.code.bits
        columns = matrix.block[1]
        span = columns & -columns if columns < matrix.matrix[1] else most * per
        middle = 128.0 if code is Code.INT8 else MIDDLE.get(code, 0.0)
        piece = max(min(span // per, most, MOST_PIECE), 1)
        return cls(code.value, middle, KINDS.get(matrix.scales.dtype, "float"), per, piece, span < per)


@lru_cache
def table_of(code: Code, device: torch.device) -> Tensor | None:
    """Return the values of codes that follow no rule, float32 `[16]`."""
    if code is not Code.NF4:
        return None
    with torch.inference_mode(False):
        return torch.tensor(VALUES[code], dtype=torch.float32, device=device)


# Numbers below are exact. The bits of a small float within those of a wider one stand for the same number times a
# power of two, subnormal ones included. It is left to the caller as `unit`, to be multiplied by once for many. And
# 2^23 + n is a float whose last bits are n.
@triton.jit
def values(n, zero, table, code: tl.constexpr):
    """Return the values of codes `n`, int32, less those that stand for zero, in float32 and in `unit`s."""
    if code == "fp4":
        value = float16(((n << 9) | (n << 12)) & 0x8E00)
    elif code == "fp8":
        value = float16(((n & 0x80) << 8) | ((n & 0x7F) << 7))
        value = tl.where(tl.abs(value) == 1.875, float("nan"), value)  # all bits set are no number
    elif code == "nf4":
        value = tl.load(table + n)
    else:
        flipped = n ^ 0x80 if code == "int8" else n
        value = (flipped | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
    return value


@triton.jit
def both_values(codes, zero, table, code: tl.constexpr):
    """Return the `values` of bytes that hold two codes each: of the low halves, and of the high ones."""
    if code == "fp4":  # side by side in one integer, which takes half the work
        pair = (codes | (codes << 12)) & 0x000F000F
        bits = ((pair << 9) | (pair << 12)) & -0x71FF7200  # 0x8E00 twice
        low, high = float16(bits), float16(bits >> 16)
    else:
        low, high = values(codes & 15, zero, table, code), values(codes >> 4, zero, table, code)
    return low, high


@triton.jit
def float16(bits):
    """Return the number that the low 16 bits stand for as float16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unit(code: tl.constexpr):
    """Return what `values` are multiples of: float16 has more exponents for zero, by 14 and by 8."""
    return 16384.0 if code == "fp4" else 256.0 if code == "fp8" else 1.0


@triton.jit
def scale_values(raw, kind: tl.constexpr):
    """Return scales in float32."""
    if kind == "e4m3":
        value = values(raw.to(tl.int32), 0.0, raw, "fp8") * unit("fp8")
    elif kind == "e8m0":
        n = raw.to(tl.int32)
        bits = tl.where(n == 0, 0x00400000, tl.where(n == 255, 0x7FC00000, n << 23))
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def blocks_of(
    scales,
    zeros,
    factor,
    rows,
    columns,
    held,
    scales_row,
    zeros_row,
    block_rows,
    block_columns,
    kind: tl.constexpr,
    middle: tl.constexpr,
):
    """Return the scales and zeros of `rows` and `columns`, `[rows, columns]`; those not `held` are not read."""
    down, across = (rows // block_rows).to(tl.int64), columns // block_columns
    raw = tl.load(scales + down[:, None] * scales_row + across[None, :], mask=held, other=0)
    zero = tl.full(held.shape, middle, tl.float32)
    if zeros is not None:
        zero = tl.load(zeros + down[:, None] * zeros_row + across[None, :], mask=held, other=0).to(tl.float32)
    return tl.where(held, scale_values(raw, kind) * factor, 0.0), zero
