"""Chooses the matmul for a weight, and pads rows to few different counts.

The choice is a pure function of shape, kind, memory order, rows and the stored calibration. `linear` is torch's own
`F.linear(x, W)`, of a packed weight after it was decoded whole. `rows_last` is `mm(W, xᵀ)ᵀ`: with AMX it reads the
weights at up to twice the bandwidth for few rows, without AMX it can be five times slower. `vector` is `mv(W, x)`,
for one row. `native` is ours (native.c), where it could be compiled. Only a measurement on this machine picks one
of the last three, but a packed weight that was not measured is `native` wherever it can be.

oneDNN, which multiplies torch's 16-bit matrices on a CPU, compiles a kernel for every row count of every weight
shape, two thirds of a megabyte each, and keeps the latest 1024 of them for the life of the process. So rows are
multiplied only in the counts of `ROOMS`, and zeros fill up the last one. float32 goes to MKL, which keeps nothing,
and its rows are not padded.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.formula import Matmul
from fiddler.devices.native import MOST_ROWS, Native
from fiddler.formats.packed import Matrix, Packed, kind

ROOMS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Row counts that are multiplied."""
FEW = 32
"""Up to this many rows a product takes as long as reading its weight, and zeros cost nothing."""
MOST_ZEROS = 0.25
"""With more rows: beyond this share of zeros they take two rooms, though the weight is then read twice."""


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
    parts = []
    for part in x.split(sizes):
        parts.append(matmul(part, weight, bias))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:n_rows]


KernelName = Literal["linear", "rows_last", "vector", "native"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Row counts that are calibrated; others use the nearest below."""
TIE = 512
"""From this many rows on the kernels tie, and `linear` is taken."""

ShapeKey = tuple[int, int, str, bool]
"""(out, in, kind of its numbers, whether columns lie side by side) of a weight matrix."""


def bucket(n_rows: int) -> int:
    """Return the largest calibrated row count that is at most `n_rows` (`n_rows` ≥ 1)."""
    return max(b for b in BUCKETS if b <= n_rows)


def shape_key(weight: Matrix) -> ShapeKey:
    """Return the calibration's key of a weight matrix `[out, in]`."""
    out, columns = weight.shape
    return out, columns, kind(weight), isinstance(weight, Packed) or weight.stride(1) == 1


linear = partial(in_rooms, F.linear)
"""Return `x Wᵀ + b`, `[n, out]`, rows first."""


def rows_last(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same, computed as `(W xᵀ)ᵀ`."""
    return in_rooms(_rows_last, x, _without_gaps(weight), bias)


def _rows_last(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n_rows = x.shape[0]
    if n_rows == 1:  # one column would take torch's matrix-vector path: two keep the AMX tiles
        x = x.expand(2, -1)
    y = torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())
    return y.t()[:n_rows]


def vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same for exactly one row."""
    weight = weight if 1 in weight.stride() else _without_gaps(weight)
    y = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
    return y[None]


def _without_gaps(weight: Tensor) -> Tensor:
    """Return the weight in its own memory order, as its block has it; torch would copy one with gaps into another.

    `linear` needs none of it: of a matrix with gaps torch copies the transpose, which comes to the same.
    """
    if 1 in weight.stride():
        return weight
    return weight.t().contiguous().t() if weight.stride(0) < weight.stride(1) else weight.contiguous()


def decoded(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """Return the same for a packed weight, decoded whole to the rows' dtype first."""
    return linear(x, weight.dense(x.dtype) if isinstance(weight, Packed) else weight, bias)


TORCH: Mapping[KernelName, Matmul] = {"linear": linear, "rows_last": rows_last, "vector": vector}
"""The kernels that are always there."""
_WHOLE: Mapping[KernelName, Matmul] = {"linear": F.linear, "rows_last": _rows_last, "vector": vector}
"""Kernels for rows that fill a room, and weights without gaps."""

ProductKey = tuple[torch.Size, tuple[int, ...], torch.dtype, int]
"""(shape, strides, dtype) of a weight matrix, and the rows that it multiplies."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The choice per (weight shape, row bucket); without one `linear`, or for a packed weight `native`."""

    choice: Mapping[tuple[ShapeKey, int], KernelName] = field(default_factory=dict)
    native: Native | None = None
    """Our own kernels, where they could be compiled."""
    products: dict[ProductKey, Matmul] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Cache of `product`, for fewer than `TIE` rows."""

    def name(self, weight: Matrix, n_rows: int) -> KernelName:
        """Return the kernel's name for `n_rows` rows of this weight."""
        if n_rows >= TIE:
            return "linear"
        packed = isinstance(weight, Packed) and self.native is not None
        chosen = self.choice.get((shape_key(weight), bucket(n_rows)), "native" if packed else "linear")
        return "linear" if chosen == "native" and n_rows > MOST_ROWS else chosen

    def pick(self, weight: Matrix, n_rows: int) -> Matmul:
        """Return the kernel for `n_rows` rows of this weight."""
        return self.kernel(self.name(weight, n_rows), packed=isinstance(weight, Packed))

    def _whole(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """Return the product with a packed weight that our kernels decode whole first."""
        assert self.native is not None
        narrow = x.dtype == torch.bfloat16
        return linear(x, self.native.dense(weight) if narrow else weight.dense(x.dtype), bias)

    def is_ours(self, weight: Matrix, n_rows: int) -> bool:
        """Whether our own kernels are the ones to take for `n_rows` rows of this weight."""
        return self.name(weight, n_rows) == "native"

    def product(self, weight: Tensor, n_rows: int) -> Matmul:
        """Return a function that computes as that kernel does for exactly `n_rows` rows, without padding if they
        fill a room.

        Callers look into `products` first. Its keys hold all that the choice depends on: a weight may be replaced.
        """
        if not n_rows:
            return F.linear
        name, stride = self.name(weight, n_rows), weight.stride()
        fills = weight.dtype == torch.float32 or rooms(n_rows) == (n_rows,)
        whole = name in _WHOLE and fills and 1 in stride
        found = _WHOLE[name] if whole else self.kernel(name)
        if n_rows < TIE:
            self.products[weight.shape, stride, weight.dtype, n_rows] = found
        return found

    def kernel(self, name: KernelName, *, packed: bool = False) -> Matmul:
        """Return a kernel by name, for packed weights or for others."""
        if name == "native":
            assert self.native is not None
            return self.native.matmul
        if packed:
            return decoded if self.native is None else self._whole
        return TORCH[name]
