"""Which matmul multiplies a weight: a pure function of (shape, dtype, memory order, rows, stored calibration).

`linear` is torch's own `F.linear(x, W)`. `rows_last` is `mm(W, xᵀ)ᵀ`: with AMX it reads the weights at up to twice
the bandwidth for few rows, without AMX it can be five times slower. `vector` is `mv(W, x)`, for one row. `native`
is ours (native.c), where it could be compiled. Only a measurement on this machine picks one of the last three.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.base import Matmul
from fiddler.devices.native import MOST_ROWS, Native
from fiddler.devices.rooms import in_rooms

KernelName = Literal["linear", "rows_last", "vector", "native"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Row counts that are calibrated; others use the nearest below."""
TIE = 512
"""From this many rows on the kernels tie, and `linear` is taken."""

ShapeKey = tuple[int, int, torch.dtype, bool]
"""(out, in, dtype, whether columns lie side by side) of a weight matrix."""


def bucket(n_rows: int) -> int:
    """Return the largest calibrated row count that is at most `n_rows` (`n_rows` ≥ 1)."""
    return max(b for b in BUCKETS if b <= n_rows)


def shape_key(weight: Tensor) -> ShapeKey:
    """Return what a calibration knows of a weight matrix `[out, in]`."""
    return weight.shape[0], weight.shape[1], weight.dtype, weight.stride(1) == 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x Wᵀ + b`, `[n, out]`, rows first."""
    return in_rooms(_linear, x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def rows_last(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same, computed as `(W xᵀ)ᵀ`."""
    return in_rooms(_rows_last, x, _without_gaps(weight), bias)


def _rows_last(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 1:  # one column would take torch's matrix-vector path: two keep the AMX tiles
        return _rows_last(x.expand(2, -1), weight, bias)[:1]
    y = torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())
    return y.t()


def vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same for exactly one row."""
    weight = _without_gaps(weight)
    y = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
    return y[None]


def _without_gaps(weight: Tensor) -> Tensor:
    """Return the weight in its own memory order, as its block has it; torch would copy one with gaps into another.

    `linear` needs none of it: of a matrix with gaps torch copies the transpose, which comes to the same.
    """
    if 1 in weight.stride():
        return weight
    return weight.t().contiguous().t() if weight.stride(0) < weight.stride(1) else weight.contiguous()


TORCH: Mapping[KernelName, Matmul] = {"linear": linear, "rows_last": rows_last, "vector": vector}
"""The kernels that are always there."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The choice per (weight shape, row bucket); `linear` where nothing was calibrated."""

    choice: Mapping[tuple[ShapeKey, int], KernelName] = field(default_factory=dict)
    native: Native | None = None
    """Ours, where they could be compiled."""

    def name(self, weight: Tensor, n_rows: int) -> KernelName:
        """Return the kernel's name for `n_rows` rows of this weight."""
        if n_rows >= TIE:
            return "linear"
        chosen = self.choice.get((shape_key(weight), bucket(n_rows)), "linear")
        return "linear" if chosen == "native" and n_rows > MOST_ROWS else chosen

    def pick(self, weight: Tensor, n_rows: int) -> Matmul:
        """Return the kernel for `n_rows` rows of this weight."""
        return self.kernel(self.name(weight, n_rows))

    def kernel(self, name: KernelName) -> Matmul:
        """Return a kernel by name."""
        if name == "native":
            assert self.native is not None
            return self.native.matmul
        return TORCH[name]
