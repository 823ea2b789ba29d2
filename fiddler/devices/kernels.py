"""Which matmul multiplies an expert: a pure function of (shape, dtype, rows, stored calibration).

`linear` is torch's own `F.linear(x, W)`. `rows_last` is `mm(W, xᵀ)ᵀ`: with AMX it reads the weights at up to twice
the bandwidth for few rows, without AMX it can be five times slower, so only a measurement on this machine picks
it. A single row is padded to two there: one row would fall back to a matrix-vector path.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

KernelName = Literal["linear", "rows_last"]
KERNELS: tuple[KernelName, ...] = ("linear", "rows_last")

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Row counts that are calibrated; others use the nearest below. At 512 rows the kernels tie."""

ShapeKey = tuple[int, int, torch.dtype]
"""(out, in, dtype) of a weight matrix."""


def bucket(n_rows: int) -> int:
    """Return the largest calibrated row count that is at most `n_rows` (`n_rows` ≥ 1)."""
    return max(b for b in BUCKETS if b <= n_rows)


_BUCKET_OF = tuple(bucket(max(n, 1)) for n in range(BUCKETS[-1] + 1))


def shape_key(weight: Tensor) -> ShapeKey:
    """Return what a calibration knows of a weight matrix `[out, in]`."""
    return weight.shape[0], weight.shape[1], weight.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x Wᵀ + b`, `[n, out]`, rows first."""
    return F.linear(x, weight, bias)


def rows_last(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same as `linear`, computed as `(W xᵀ)ᵀ`; the result is a transposed view."""
    y = torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())
    return y.t()


@dataclass(frozen=True, slots=True)
class Kernels:
    """The choice per (weight shape, row bucket); `linear` where nothing was calibrated."""

    choice: Mapping[tuple[ShapeKey, int], KernelName] = field(default_factory=dict)

    def name(self, weight: Tensor, n_rows: int) -> KernelName:
        """Return the kernel for `n_rows` rows of this weight."""
        rows = _BUCKET_OF[min(n_rows, BUCKETS[-1])]
        return self.choice.get((shape_key(weight), rows), "linear")

    def padded(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return `x`, its only row doubled where the kernel for this weight wants two."""
        if x.shape[0] == 1 and self.name(weight, 1) == "rows_last":
            return x.expand(2, -1)
        return x

    def matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None, n_rows: int) -> Tensor:
        """Return `x Wᵀ + b`; `n_rows` counts the rows before padding and decides the kernel."""
        kernel = rows_last if self.name(weight, n_rows) == "rows_last" else linear
        return kernel(x, weight, bias)
