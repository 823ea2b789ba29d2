"""Decodes quantised matrices of some slots into plain ones, in Triton: each code is read once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.stack import ROW_ALIGNMENT, PackedStack
from fiddler.gpu.triton_codes import INTEGERS, Coding, blocks_of, both_values, table_of, unit, values
from fiddler.gpu.triton_ggml import Blocks, block_numbers
from fiddler.gpu.triton_tiles import WARPS

TILE_OUT, TILE_INNER = 16, 256
"""Rows, and bytes of each, that one program decodes; columns of GGUF's blocks."""
NUMBERS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def decode(matrix: PackedStack, slots: Tensor, known: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the matrices `[n, out, in]` in `slots`, int32 `[n]`; rows start at multiples of `ROW_ALIGNMENT`."""
    n_out, n_inner = matrix.matrix
    step = ROW_ALIGNMENT // dtype.itemsize
    room = matrix.codes.new_empty((len(slots), n_out, -(-n_inner // step) * step), dtype=dtype)
    (_launch_blocks if matrix.scales is None else _launch)(matrix, slots, room)
    return room[:, :, :n_inner]


def _launch(matrix: PackedStack, slots: Tensor, room: Tensor) -> None:
    (n_out, n_inner), n_bytes = matrix.matrix, matrix.codes.shape[2]
    coding = Coding.of(matrix, TILE_INNER)
    to = room.view(INTEGERS[room.dtype]) if coding.places == 2 else room
    _decode[triton.cdiv(n_bytes, TILE_INNER), triton.cdiv(n_out, TILE_OUT), len(slots)](
        *matrix.arguments,
        to,
        slots,
        table_of(matrix.code, slots.device),
        n_out,
        n_inner,
        n_bytes,
        to.stride(0),
        to.stride(1),
        *matrix.strides,
        *matrix.block,
        **coding._asdict(),
        dtype=NUMBERS[room.dtype],
        tile_out=TILE_OUT,
        tile_inner=TILE_INNER,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def _launch_blocks(matrix: PackedStack, slots: Tensor, room: Tensor) -> None:
    n_out, n_inner = matrix.matrix
    _decode_blocks[triton.cdiv(n_inner, TILE_INNER), triton.cdiv(n_out, TILE_OUT), len(slots)](
        matrix.codes,
        matrix.factors,
        room,
        slots,
        n_out,
        n_inner,
        room.stride(0),
        room.stride(1),
        matrix.codes.stride(0),
        matrix.codes.stride(1),
        matrix.factors.stride(0),
        **Blocks.of(matrix)._asdict(),
        dtype=NUMBERS[room.dtype],
        tile_out=TILE_OUT,
        tile_inner=TILE_INNER,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _decode(
    codes,
    scales,
    zeros,
    factors,
    to,
    slots,
    table,
    n_out,
    n_inner,
    n_bytes,
    to_slot,
    to_row,
    codes_slot,
    codes_row,
    scales_slot,
    scales_row,
    zeros_slot,
    zeros_row,
    factors_slot,
    block_rows,
    block_columns,
    code: tl.constexpr,
    middle: tl.constexpr,
    kind: tl.constexpr,
    places: tl.constexpr,
    piece: tl.constexpr,
    apart: tl.constexpr,
    dtype: tl.constexpr,
    tile_out: tl.constexpr,
    tile_inner: tl.constexpr,
):
    """Decode one tile of one slot's matrix. Two numbers of a byte are written as one integer."""
    slot = tl.load(slots + tl.program_id(2)).to(tl.int64)
    rows = tl.program_id(1) * tile_out + tl.arange(0, tile_out)
    pieces = tl.program_id(0) * tile_inner + tl.arange(0, tile_inner // piece) * piece
    at = pieces[None, :, None] + tl.arange(0, piece)[None, None, :]
    there = rows < n_out
    within = there[:, None, None] & (at < n_bytes)
    n = tl.load(codes + slot * codes_slot + rows[:, None, None] * codes_row + at, mask=within, other=0).to(tl.int32)
    scales, factor = scales + slot * scales_slot, tl.load(factors + slot * factors_slot)
    if zeros is not None:
        zeros += slot * zeros_slot
    columns = pieces * places
    held = there[:, None] & (columns < n_inner)[None, :]
    scale, zero = blocks_of(
        scales, zeros, factor, rows, columns, held, scales_row, zeros_row, block_rows, block_columns, kind, middle
    )
    to += tl.program_id(2).to(tl.int64) * to_slot + rows[:, None, None] * to_row + at
    if places == 1:
        number = values(n, zero[:, :, None], table, code) * unit(code) * scale[:, :, None]
        tl.store(to, number.to(dtype), mask=within)
    else:
        low, high = both_values(n, zero[:, :, None], table, code)
        low = low * unit(code) * scale[:, :, None]
        if apart:
            held = there[:, None] & (columns + 1 < n_inner)[None, :]
            scale, zero = blocks_of(
                scales, zeros, factor, rows, columns + 1, held, scales_row, zeros_row, block_rows, block_columns,
                kind, middle,
            )  # fmt: skip
            high = values(n >> 4, zero[:, :, None], table, code)
        tl.store(to, _pairs(low, high * unit(code) * scale[:, :, None], dtype), mask=within)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _decode_blocks(
    codes,
    factors,
    to,
    slots,
    n_out,
    n_inner,
    to_slot,
    to_row,
    codes_slot,
    codes_row,
    factors_slot,
    kind: tl.constexpr,
    block_columns: tl.constexpr,
    block_bytes: tl.constexpr,
    dtype: tl.constexpr,
    tile_out: tl.constexpr,
    tile_inner: tl.constexpr,
):
    """Decode one tile of one slot's matrix of GGUF's blocks."""
    slot = tl.load(slots + tl.program_id(2)).to(tl.int64)
    rows, start = tl.program_id(1) * tile_out + tl.arange(0, tile_out), tl.program_id(0) * tile_inner
    places, there = codes + slot * codes_slot + rows * codes_row, rows < n_out
    numbers = block_numbers(places, there, start, n_inner, kind, block_columns, block_bytes, tile_inner)
    numbers *= tl.load(factors + slot * factors_slot)
    columns = start + tl.arange(0, tile_inner)
    at = tl.program_id(2).to(tl.int64) * to_slot + rows[:, None] * to_row + columns[None, :]
    tl.store(to + at, numbers.to(dtype), mask=there[:, None] & (columns < n_inner)[None, :])


@triton.jit
def _pairs(first, second, dtype: tl.constexpr):
    """Return two numbers as one integer, the first in its low half."""
    bits: tl.constexpr = dtype.primitive_bitwidth
    half: tl.constexpr = tl.int32 if bits == 32 else tl.int16
    whole: tl.constexpr = tl.int64 if bits == 32 else tl.int32
    low = first.to(dtype).to(half, bitcast=True).to(whole) & ((1 << bits) - 1)
    return low | (second.to(dtype).to(half, bitcast=True).to(whole) << bits)
