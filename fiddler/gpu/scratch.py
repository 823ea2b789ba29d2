"""Many rows of quantised experts: a few matrices at a time are decoded into a scratch, and multiplied there.

A matrix is written to the scratch and read from it once, however many rows there are. The scratch holds the same
matrix of as many experts as fit `SCRATCH_BYTES`, and lives no longer than its product.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.formula import ExpertFormula, run_expert
from fiddler.devices.kernels import linear
from fiddler.formats.packed import Packed
from fiddler.gpu.stack import PackedStack, Stack, StackedMatrix
from fiddler.gpu.visits import MOST_GROUPS, Visits
from fiddler.types import ExpertWeights

SCRATCH_BYTES = 64 << 20
"""Bytes of decoded weights at once, unless one matrix is more: ten of Qwen3-30B-A3B's gates and ups, which are work
enough for a GPU, and little of its memory. Assumed, not measured."""
TORCH_BYTES = 20
"""Bytes that torch takes to decode a number of 4 bits, at most: the codes of a pair (2), indices of 8 bytes and of
4, and floats. Source: `Packed.dense`. Blocks of GGUF's take 8 to 16."""

Decode = Callable[[PackedStack, Tensor, Sequence[int], torch.dtype], Tensor]
"""`(matrix, slots int32 [n], the same for the host, dtype) -> [n, out, in]`, numbers of a row side by side."""


def by_torch(matrix: PackedStack, slots: Tensor, known: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the matrices in some slots, decoded; works on every device."""
    return torch.stack([matrix.dense(slot, dtype) for slot in known])


def scratch_bytes(weights: ExpertWeights, n_experts: int, dtype: torch.dtype, *, kernels: bool) -> int:
    """Return the bytes that many rows of experts like this one, `n_experts` a layer, take beside their results.

    `kernels` says whether Triton decodes; torch takes more.
    """
    sizes = [matrix.shape[0] * matrix.shape[1] for matrix in weights.matrices if isinstance(matrix, Packed)]
    if not sizes:
        return 0
    largest = max(sizes) * dtype.itemsize
    held = min(max(SCRATCH_BYTES, largest), n_experts * largest)
    return held if kernels else 2 * held + max(sizes) * TORCH_BYTES


def run_decoded(
    stack: Stack,
    formula: ExpertFormula,
    visits: Visits,
    hidden: Tensor,
    out: Tensor,
    *,
    decode: Decode,
    grouped: bool,
) -> None:
    """Write each row's result; of several experts at once if `grouped`, which `F.grouped_mm` must take."""
    positions = visits.positions.long()
    tokens = positions // visits.top_k
    for first, stop in pairwise(_cuts(stack, visits, hidden.dtype, grouped=grouped)):
        groups = visits.groups[first:stop]
        start = groups[0][1]
        rows = slice(start, groups[-1][2])
        if rows.start == rows.stop:
            continue
        multiply = partial(_multiply, decode, visits.slots[first:stop], [slot for slot, _, _ in groups])
        ends = visits.bounds[first + 1 : stop + 1] - start
        x = hidden.index_select(0, tokens[rows])
        out.index_copy_(0, positions[rows], run_expert(formula, stack, x, *(partial(multiply, ends),) * 2))


def _cuts(stack: Stack, visits: Visits, dtype: torch.dtype, *, grouped: bool) -> list[int]:
    """Return where windows of groups begin, and the end of all."""
    n, most = len(visits.groups), 1
    if grouped:
        largest = max(matrix.shape[1] * matrix.shape[2] for matrix in (*stack.up, stack.down))
        most = max(min(SCRATCH_BYTES // (largest * dtype.itemsize), MOST_GROUPS), 1)
    return [*range(0, n, most), n]


def _multiply(
    decode: Decode,
    slots: Tensor,
    known: Sequence[int],
    ends: Tensor,
    x: Tensor,
    weight: StackedMatrix,
    bias: Tensor | None,
) -> Tensor:
    """Return `[R, out]` for `x` `[R, in]`: rows up to each of `ends` by the weight in the slot of their group."""
    if isinstance(weight, PackedStack):
        dense = decode(weight, slots, known, x.dtype)
    else:
        dense = weight.index_select(0, slots.long())
    if len(known) == 1:
        return linear(x, dense[0], None if bias is None else bias[known[0]])
    y: Tensor = F.grouped_mm(x.contiguous(), dense.transpose(1, 2), offs=ends)
    if bias is None:
        return y
    counts = ends.diff(prepend=ends.new_zeros(1))
    own = slots.long().repeat_interleave(counts, output_size=len(x))
    return y + bias.index_select(0, own)
