"""The kernel of quantised experts of few rows, in Triton: weights are read as codes and decoded in registers.

Its tiles, groups and twins are those of triton_kernels.py. Rows of codes are cut into pieces that have one scale
each, so a thread reads as many codes as it can at once, and one scale for them. Where a byte holds two columns,
rows of `x` are read in pairs, and the pairs' halves multiplied by the bytes' halves: no weight changes its thread.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fiddler.formats.packed import Code
from fiddler.gpu.stack import PackedStack
from fiddler.gpu.triton_codes import INTEGERS, Coding, blocks_of, both_values, table_of, unit, values
from fiddler.gpu.triton_tiles import STAGES, TILE_ROWS, WARPS, Matrix, Tile, finish, plus, visited
from fiddler.gpu.visits import Visits


def packed_tile(most_rows: int, item: int) -> Tile:
    """Return the tile for the rows of the largest group, and bytes of their numbers; `inner` are bytes of codes.

    A turn reads 4 KiB of a matrix, 32 bytes for each thread of a program: half of what a turn reads of plain
    weights, since each byte is two numbers in registers. Worked out on paper, as `tile_of` is. Rows of float32 are
    multiplied without tensor cores, and larger tiles than these would not fit the registers.
    """
    if most_rows <= 1:
        return Tile(1, 16, 256)
    return Tile(TILE_ROWS, 32, 128) if item == 2 else Tile(TILE_ROWS, 16, 32)


def paired(x: Tensor) -> Tensor:
    """Return rows `[n, in]` as integers of two numbers each, with a zero behind the last if `in` is odd."""
    x = F.pad(x, (0, 1)) if x.shape[1] % 2 else x.contiguous()
    pair = INTEGERS[x.dtype]
    return (x.clone() if x.data_ptr() % pair.itemsize else x).view(pair)


def launch_packed(
    x: Tensor, matrix: Matrix, out: Tensor, visits: Visits, *, gather: bool = False, scatter: bool = False
) -> None:
    """Queue one kernel: see `_launch` in triton_kernels.py."""
    weight, twin = matrix.weight, matrix.twin
    assert isinstance(weight, PackedStack)
    tile = packed_tile(visits.most_rows, x.dtype.itemsize)
    coding, given = Coding.of(weight, tile.inner), weight.arguments
    x = paired(x) if coding.places == 2 else x
    (n_out, n_inner), n_bytes = weight.matrix, weight.codes.shape[2]
    blocks, tiles = triton.cdiv(n_out, tile.out), triton.cdiv(visits.most_rows, tile.rows)
    _multiply_packed[blocks, visits.slots.shape[0], tiles](
        x,
        *given,
        *(twin.arguments if isinstance(twin, PackedStack) else (None,) * len(given)),
        matrix.bias,
        matrix.twin_bias,
        out,
        visits.slots,
        visits.bounds,
        visits.positions,
        table_of(weight.code, x.device),
        visits.top_k,
        n_out,
        n_inner,
        n_bytes,
        x.stride(0),
        out.stride(0),
        *weight.strides,
        0 if matrix.bias is None else matrix.bias.stride(0),
        *weight.block,
        **coding._asdict(),
        twins=twin is not None,
        gather=gather,
        scatter=scatter,
        tile_rows=tile.rows,
        tile_out=tile.out,
        tile_inner=tile.inner,
        num_warps=WARPS,
        num_stages=1 if weight.code is Code.NF4 else STAGES,  # or values from the table are brought ahead too
        enable_fp_fusion=True,
    )


# Offsets have the widths they have in triton_kernels.py.
@triton.jit(do_not_specialize=["top_k"], do_not_specialize_on_alignment=["slots", "bounds", "positions"])
def _multiply_packed(
    x,
    codes,
    scales,
    zeros,
    factors,
    twin_codes,
    twin_scales,
    twin_zeros,
    twin_factors,
    bias,
    twin_bias,
    out,
    slots,
    bounds,
    positions,
    table,
    top_k,
    n_out,
    n_inner,
    n_bytes,
    x_stride,
    out_stride,
    codes_slot,
    codes_row,
    scales_slot,
    scales_row,
    zeros_slot,
    zeros_row,
    factors_slot,
    bias_stride,
    block_rows,
    block_columns,
    code: tl.constexpr,
    middle: tl.constexpr,
    kind: tl.constexpr,
    places: tl.constexpr,
    piece: tl.constexpr,
    apart: tl.constexpr,
    twins: tl.constexpr,
    gather: tl.constexpr,
    scatter: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_out: tl.constexpr,
    tile_inner: tl.constexpr,
):
    """Multiply one tile of a group's rows by one block of its slot's weight, summing in float32."""
    group = tl.program_id(1)
    first = tl.load(bounds + group) + tl.program_id(2) * tile_rows
    stop = tl.load(bounds + group + 1)
    if first >= stop:
        return
    taken, sources, targets = visited(positions, first, stop, top_k, gather, scatter, tile_rows)
    slot = tl.load(slots + group).to(tl.int64)
    rows = tl.program_id(0) * tile_out + tl.arange(0, tile_out)
    there = rows < n_out
    n_pieces: tl.constexpr = tile_inner // piece
    pieces = tl.arange(0, n_pieces) * piece
    inner = tl.arange(0, tile_inner)
    at = pieces[None, :, None] + tl.arange(0, piece)[None, None, :]
    x += sources[:, None, None] * x_stride + at if tile_rows == 1 else sources[:, None] * x_stride + inner[None, :]
    codes += slot * codes_slot + rows[:, None, None] * codes_row + at
    scales, factor = scales + slot * scales_slot, tl.load(factors + slot * factors_slot)
    if zeros is not None:
        zeros += slot * zeros_slot
    if twins:
        twin_codes += slot * codes_slot + rows[:, None, None] * codes_row + at
        twin_scales += slot * scales_slot
        twin_factor = tl.load(twin_factors + slot * factors_slot)
        if twin_zeros is not None:
            twin_zeros += slot * zeros_slot
    total = tl.full([tile_out, n_pieces] if tile_rows == 1 else [tile_rows, tile_out], 0.0, tl.float32)
    twin_total = total
    for start in range(0, n_bytes, tile_inner):
        if tile_rows == 1:
            some = tl.load(x + start, mask=at < n_bytes - start, other=0)
        else:
            some = tl.load(x + start, mask=taken[:, None] & (inner < n_bytes - start)[None, :], other=0)
        held = there[:, None, None] & (at < n_bytes - start)
        columns = (start + pieces) * places
        total = _add(
            total, some, tl.load(codes + start, mask=held, other=0), table, scales, zeros, factor, rows, there,
            columns, n_inner, scales_row, zeros_row, block_rows, block_columns, out.dtype.element_ty, code, middle,
            kind, places, apart, tile_rows,
        )  # fmt: skip
        if twins:
            twin_total = _add(
                twin_total, some, tl.load(twin_codes + start, mask=held, other=0), table, twin_scales, twin_zeros,
                twin_factor, rows, there, columns, n_inner, scales_row, zeros_row, block_rows, block_columns,
                out.dtype.element_ty, code, middle, kind, places, apart, tile_rows,
            )  # fmt: skip
    y = finish(total, bias, slot * bias_stride + rows, there, tile_rows, 1)
    if twins:
        y *= finish(twin_total, twin_bias, slot * bias_stride + rows, there, tile_rows, 1) / (1.0 + tl.exp(-y))
    to = out + targets[:, None] * out_stride + rows[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=taken[:, None] & there[None, :])


@triton.jit
def _add(
    total, x, codes, table, scales, zeros, factor, rows, there, columns, n_inner, scales_row, zeros_row, block_rows,
    block_columns, dtype: tl.constexpr, code: tl.constexpr, middle: tl.constexpr, kind: tl.constexpr,
    places: tl.constexpr, apart: tl.constexpr, tile_rows: tl.constexpr,
):  # fmt: skip
    """Add the products of a tile of rows and a tile of codes `[out, pieces, piece]`."""
    held = there[:, None] & (columns < n_inner)[None, :]
    scale, zero = blocks_of(
        scales, zeros, factor, rows, columns, held, scales_row, zeros_row, block_rows, block_columns, kind, middle
    )
    n = codes.to(tl.int32)
    if places == 1:
        total = _product(total, x, values(n, zero[:, :, None], table, code), scale, code, tile_rows)
    else:
        even, odd = _half(x, 0, dtype), _half(x, 1, dtype)
        low, high = both_values(n, zero[:, :, None], table, code)
        if apart:
            held = there[:, None] & (columns + 1 < n_inner)[None, :]
            odd_scale, zero = blocks_of(
                scales, zeros, factor, rows, columns + 1, held, scales_row, zeros_row, block_rows, block_columns,
                kind, middle,
            )  # fmt: skip
            high = values(n >> 4, zero[:, :, None], table, code)
            total = _product(total, even, low, scale, code, tile_rows)
            total = _product(total, odd, high, odd_scale, code, tile_rows)
        elif tile_rows == 1:
            both = low * even.to(tl.float32) + high * odd.to(tl.float32)
            total += tl.reduce(both, 2, plus) * unit(code) * scale
        else:
            total = _product(total, even, low, scale, code, tile_rows)
            total = _product(total, odd, high, scale, code, tile_rows)
    return total


@triton.jit
def _half(pairs, side: tl.constexpr, dtype: tl.constexpr):
    """Return the first or second numbers of pairs."""
    bits: tl.constexpr = dtype.primitive_bitwidth
    half = (pairs >> (side * bits)).to(tl.int32 if bits == 32 else tl.int16)
    return half.to(dtype, bitcast=True)


@triton.jit
def _product(total, x, weight, scale, code: tl.constexpr, tile_rows: tl.constexpr):
    """Add the products of rows and values `[out, pieces, piece]`, whose scales are `[out, pieces]`.

    Those of one row are scaled when a piece is summed up; other weights are rounded to the rows' own kind. There a
    scale of 2^114 and more overflows.
    """
    if tile_rows == 1:
        total += tl.reduce(weight * x.to(tl.float32), 2, plus) * unit(code) * scale
    else:
        scaled = (weight * (scale * unit(code))[:, :, None]).to(x.dtype)
        flat = tl.reshape(scaled, [scaled.shape[0], scaled.shape[1] * scaled.shape[2]])
        total = tl.dot(x, tl.trans(flat), total, input_precision="ieee")
    return total
