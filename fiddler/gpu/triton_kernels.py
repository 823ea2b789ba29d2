"""Experts of few rows on slots, in Triton: each program finds its expert by a slot's number, nothing is gathered.

The kernel here is that of plain weights, and of GGUF's blocks, which it decodes in registers (triton_ggml.py).
triton_packed.py has the one of other quantised weights.

Importing this imports triton. The kernels run on all devices of Triton, and in Triton's interpreter. Facts that
this file relies on, with their sources:

- A launch goes to torch's current stream of the current device and lets the host go on (CUDA C++ Programming Guide,
  "Asynchronous Concurrent Execution"), so it may be captured (ibid., "Creating a Graph Using Stream Capture"). The
  first launch compiles the kernel and loads it, which a capture need not permit: run once before.
- A kernel is compiled anew for other dtypes and tiles, and for a size, stride or address that becomes, or ceases to
  be, 1 or a multiple of 16 (Triton, `triton.jit`). How many groups and rows there are is no reason, nor is where
  those three lists lie.
- What a mask leaves out is not read (Triton, `tl.load`).
"""

import triton
import triton.language as tl
from torch import Tensor

from fiddler.devices.formula import ExpertFormula, gated
from fiddler.gpu.stack import PackedStack, Stack, StackedMatrix
from fiddler.gpu.triton_ggml import Blocks, block_numbers, block_tile
from fiddler.gpu.triton_packed import launch_packed
from fiddler.gpu.triton_tiles import STAGES, TILE_ROWS, WARPS, Matrix, Tile, finish, visited
from fiddler.gpu.visits import Visits

LINE = 128
"""Bytes of a cache line. Source: CUDA C++ Best Practices Guide, "Coalesced Access to Global Memory"."""


def tile_of(most_rows: int, weight: Tensor) -> Tile:
    """Return the tile for a weight `[n_slots, out, in]` and the rows of the largest group.

    Reading weights takes most of the time. A turn reads up to 8 KiB of a matrix, in runs along the dimension that
    lies side by side: 512 bytes for one row, which are the widest load, 16 bytes, of each lane of a warp; two lines
    for more rows, since `tl.dot` wants more rows of the weight; one line where the weight is transposed.

    Enough to fill a GPU, on paper: 3.35 TB/s (NVIDIA H100 SXM data sheet) at about 0.7 microseconds for a load are
    2.3 MB in flight (Little's law), 18 KB for each of 132 SMs. A token of Qwen3-30B-A3B asks for little, with its
    gates and ups: 8 experts of 768 / 16 programs are three for an SM, and each reads 16 KiB in a turn.
    """
    item = weight.element_size()
    rows = 1 if most_rows <= 1 else TILE_ROWS
    if weight.stride(1) < weight.stride(2):
        return Tile(rows, LINE // item, 64)
    return Tile(rows, 16, 4 * LINE // item) if rows == 1 else Tile(rows, 32, 2 * LINE // item)


def run(stack: Stack, formula: ExpertFormula, swiglu: bool, visits: Visits, hidden: Tensor, out: Tensor) -> None:
    """Write `out[position] = expert(hidden[position // top_k])`; `hidden` is `[T, H]`, `out` `[T * K, H]`.

    `swiglu` is `formula.is_swiglu`. Which rows go where is read on the device: the host reads only the counts of
    `visits`. Raises Triton's error for a kernel that it cannot compile.
    """
    hidden = hidden.contiguous()
    twins = stack.twins if swiglu else None
    if twins is None:
        biases: tuple[Tensor | None, ...] = stack.up_bias or (None,) * len(stack.up)
        ups = [_up(hidden, Matrix(w, None, b, None), visits) for w, b in zip(stack.up, biases, strict=True)]
        middle = gated(formula, ups).contiguous()
    else:
        (gate, gate_bias), (up, up_bias) = twins
        middle = _up(hidden, Matrix(gate, up, gate_bias, up_bias), visits)
    down = Matrix(stack.down, None, stack.down_bias, None)
    if formula.post_norm is None:
        _launch(middle, down, out, visits, scatter=True)
        return
    y = middle.new_empty(visits.n_rows, stack.down.shape[1])
    _launch(middle, down, y, visits)
    out.index_copy_(0, visits.positions.long(), formula.post_norm(y))


def _up(hidden: Tensor, matrix: Matrix, visits: Visits) -> Tensor:
    """Return `[R, out]`, rows in the order of `visits`."""
    made = hidden.new_empty(visits.n_rows, matrix.weight.shape[1])
    _launch(hidden, matrix, made, visits, gather=True)
    return made


def _launch(
    x: Tensor, matrix: Matrix, out: Tensor, visits: Visits, *, gather: bool = False, scatter: bool = False
) -> None:
    """Queue one kernel.

    Rows of `x` are tokens if `gather`, those of `out` positions if `scatter`, else they are in the order of
    `visits`. Columns of both lie side by side.
    """
    weight, twin, bias = matrix.weight, matrix.twin, matrix.bias
    if isinstance(weight, PackedStack) and weight.scales is not None:
        launch_packed(x, matrix, out, visits, gather=gather, scatter=scatter)
        return
    numbers, factors = _parts(weight)
    blocks = Blocks.of(weight)
    tile = block_tile(visits.most_rows, x.dtype.itemsize) if blocks.kind else tile_of(visits.most_rows, numbers)
    columns, tiles = triton.cdiv(weight.shape[1], tile.out), triton.cdiv(visits.most_rows, tile.rows)
    _multiply[
        columns, visits.slots.shape[0], tiles
    ](  # columns first: programs side by side read memory side by side
        x,
        numbers,
        factors,
        *((None, None) if twin is None else _parts(twin)),
        bias,
        matrix.twin_bias,
        out,
        visits.slots,
        visits.bounds,
        visits.positions,
        visits.top_k,
        weight.shape[1],
        weight.shape[2],
        x.stride(0),
        out.stride(0),
        *numbers.stride(),
        0 if factors is None else factors.stride(0),
        0 if bias is None else bias.stride(0),
        **blocks._asdict(),
        gather=gather,
        scatter=scatter,
        tile_rows=tile.rows,
        tile_out=tile.out,
        tile_inner=tile.inner,
        num_warps=WARPS,
        num_stages=STAGES,
        enable_fp_fusion=True,  # sums are of fused products, as in any matmul; triton 3.9 warns unless it is told
    )


def _parts(matrix: StackedMatrix) -> tuple[Tensor, Tensor | None]:
    """Return numbers or blocks, and the factors of blocks."""
    return (matrix, None) if isinstance(matrix, Tensor) else (matrix.codes, matrix.factors)


# A kernel is handed addresses and numbers, each by itself. Within one matrix offsets have 32 bits: 2^31 elements
# would be an expert of 4 GiB and more. Between slots, and between rows, they have 64. `tl.zeros`, `tl.sum` and
# `tl.sigmoid` are not used: they are kernels of triton's own, which the interpreter takes only if TRITON_INTERPRET
# was set before triton was imported, and transformers imports it by way of torch.
@triton.jit(do_not_specialize=["top_k"], do_not_specialize_on_alignment=["slots", "bounds", "positions"])
def _multiply(
    x,
    weight,
    factors,
    twin,
    twin_factors,
    bias,
    twin_bias,
    out,
    slots,
    bounds,
    positions,
    top_k,
    n_out,
    n_inner,
    x_stride,
    out_stride,
    slot_stride,
    weight_out_stride,
    weight_inner_stride,
    factors_stride,
    bias_stride,
    kind: tl.constexpr,
    block_columns: tl.constexpr,
    block_bytes: tl.constexpr,
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
    columns = tl.program_id(0) * tile_out + tl.arange(0, tile_out)
    there = columns < n_out
    inner = tl.arange(0, tile_inner)
    x += _by_row(sources * x_stride, tile_rows) + _by_column(inner, tile_rows)
    places = slot * slot_stride + columns * weight_out_stride
    if kind is None:
        places = places[None, :] + inner[:, None] * weight_inner_stride
    total = tl.full([tile_inner if tile_rows == 1 else tile_rows, tile_out], 0.0, tl.float32)
    twin_total = total
    for start in range(0, n_inner, tile_inner):
        within = inner < n_inner - start
        some = tl.load(x + start, mask=_by_row(taken, tile_rows) & _by_column(within, tile_rows), other=0.0)
        tile = _weights(
            weight + places,
            weight_inner_stride,
            there,
            start,
            n_inner,
            kind,
            block_columns,
            block_bytes,
            tile_inner,
        )
        total = _add(total, some, tile, tile_rows)
        if twin is not None:
            tile = _weights(
                twin + places,
                weight_inner_stride,
                there,
                start,
                n_inner,
                kind,
                block_columns,
                block_bytes,
                tile_inner,
            )
            twin_total = _add(twin_total, some, tile, tile_rows)
    if factors is not None:
        total *= tl.load(factors + slot * factors_stride)
    y = finish(total, bias, slot * bias_stride + columns, there, tile_rows, 0)
    if twin is not None:
        if twin_factors is not None:
            twin_total *= tl.load(twin_factors + slot * factors_stride)
        y *= finish(twin_total, twin_bias, slot * bias_stride + columns, there, tile_rows, 0) / (1.0 + tl.exp(-y))
    to = out + targets[:, None] * out_stride + columns[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=taken[:, None] & there[None, :])


# A tile of `x` is `[rows, inner]`, as `tl.dot` wants it, but `[inner, 1]` where it is one row, by which the weights
# `[inner, out]` are scaled. Weights have the inner dimension first whichever way they are stored: turned round for
# `tl.dot`, loads of transposed ones were not pipelined (seen in the PTX of triton 3.9).
@triton.jit
def _by_row(values, tile_rows: tl.constexpr):
    """Shape numbers by row as a tile of `x`."""
    return values[None, :] if tile_rows == 1 else values[:, None]


@triton.jit
def _by_column(values, tile_rows: tl.constexpr):
    """Shape numbers by inner column as a tile of `x`."""
    return values[:, None] if tile_rows == 1 else values[None, :]


@triton.jit
def _weights(
    places, inner_stride, there, start, n_inner, kind: tl.constexpr, block_columns: tl.constexpr,
    block_bytes: tl.constexpr, tile_inner: tl.constexpr,
):  # fmt: skip
    """Return weights `[inner, out]` from column `start` on; `places` are addresses of numbers, or of blocks."""
    if kind is None:
        held = there[None, :] & (tl.arange(0, tile_inner) < n_inner - start)[:, None]
        weights = tl.load(places + start * inner_stride, mask=held, other=0.0)
    else:
        numbers = block_numbers(places, there, start, n_inner, kind, block_columns, block_bytes, tile_inner)
        weights = tl.trans(numbers)
    return weights


@triton.jit
def _add(total, x, weight, tile_rows: tl.constexpr):
    """Add the products of two tiles; those of one row are summed up when the loop has ended."""
    if tile_rows == 1:
        total += weight.to(tl.float32) * x.to(tl.float32)
    else:
        # "ieee": float32 keeps its bits, as in torch, which rounds it to TF32 only when told to
        total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")
    return total
