"""Quantises a matrix: rounds its numbers to codes, with the scale of each block that loses least.

Round to nearest, no data needed. In 4 bits some scales around the one that just holds a block's largest number are
tried, and that of the least squared errors is kept: clipping one number may cost less than coarser steps for all.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fiddler.errors import ConfigError
from fiddler.formats.layouts import LAYOUTS, Layout
from fiddler.formats.packed import MIDDLE, Code, Matrix, Packed
from fiddler.types import ExpertWeights


@dataclass(frozen=True, slots=True)
class Target:
    """A way to quantise: the code, and its layout, whose scales are of one row each."""

    code: Code
    layout: Layout
    largest: float
    """Largest number of the code, before scales."""
    steps: tuple[float, ...]
    """Scales that are tried, as parts of the one that just holds the largest number."""

    @property
    def group(self) -> int | None:
        """How many numbers of a row share a scale; `None`: the whole row."""
        return self.layout.columns


TARGETS = {
    "int4": Target(Code.INT4, LAYOUTS["int4"], 7.0, (0.80, 0.85, 0.90, 0.95, 1.0)),
    "int8": Target(Code.UINT8, LAYOUTS["int8"], 127.0, (1.0,)),
    "fp8": Target(Code.FP8, LAYOUTS["fp8-rows"], 448.0, (1.0,)),
}
"""The targets by name. Clipping gains nothing in 8 bits; 17 steps in 4 take twice as long for 1 % less error."""


def quantise(matrix: Tensor, target: Target) -> Packed:
    """Return a matrix `[out, in]` of floats in codes, with bfloat16 scales.

    Raises `ValueError` where a row is no multiple of the target's group, or a number is not finite.
    """
    out, columns = matrix.shape
    group = target.group or columns
    if columns % group:
        raise ValueError(f"rows of {columns} numbers do not divide into groups of {group}")
    numbers = matrix.float().contiguous().view(out, columns // group, group)
    most = numbers.abs().amax(dim=-1, keepdim=True)
    if not most.isfinite().all():
        raise ValueError("a number is not finite")
    best, least = most, torch.full_like(most, torch.inf)
    unit = torch.where(most > 0, most, torch.ones_like(most))
    for step in target.steps:
        scale = _rounded(most * (step / target.largest))
        scaled = numbers / scale
        # Beside a block's largest number: the squares of some are beyond float32.
        error = ((_nearest(scaled, target) - scaled) * (scale / unit)).square().sum(dim=-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    codes = _codes(_nearest(numbers / best, target).view(out, columns), target.code)
    return Packed(target.code, codes, best.view(out, -1).bfloat16(), (out, columns), (1, group))


def converted(weights: ExpertWeights, to: str, dtype: torch.dtype) -> ExpertWeights:
    """Return an expert quantised to a target, or, for `"bf16"`, decoded to `dtype`.

    A matrix that has as few bits already stays as it is. Raises `ConfigError` where groups do not divide a matrix's
    rows, and `ValueError` where a number is not finite.
    """

    def one(matrix: Matrix) -> Matrix:
        if to == "bf16":
            return matrix.dense(dtype) if isinstance(matrix, Packed) else matrix
        target, columns = TARGETS[to], matrix.shape[1]
        if isinstance(matrix, Packed) and matrix.code.bits <= target.code.bits:
            return matrix
        if target.group and columns % target.group:
            raise ConfigError(
                f"expert_dtype={to!r} needs rows of a multiple of {target.group} numbers, and an expert's have "
                f"{columns}; use expert_dtype='int8'"
            )
        return quantise(matrix.dense(torch.float32) if isinstance(matrix, Packed) else matrix, target)

    return replace(weights, up=tuple(map(one, weights.up)), down=one(weights.down))


def _rounded(scale: Tensor) -> Tensor:
    """Return scales as they will be stored: bfloat16, and 1 where a block is all zeros."""
    stored = scale.bfloat16().float()
    return torch.where(stored > 0, stored, torch.ones_like(stored))


def _nearest(scaled: Tensor, target: Target) -> Tensor:
    """Return the nearest numbers of the code."""
    if target.code is Code.FP8:
        return scaled.clamp(-target.largest, target.largest).to(torch.float8_e4m3fn).float()
    return scaled.round().clamp(-target.largest - 1, target.largest)


def _codes(values: Tensor, code: Code) -> Tensor:
    """Return the codes of a matrix of a code's numbers, as `Packed` has them."""
    if code is Code.FP8:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = (values + MIDDLE[code]).to(torch.uint8)
    if code.bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4
