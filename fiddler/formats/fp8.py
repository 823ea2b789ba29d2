"""FP8 as published by DeepSeek, Qwen, MiniMax, Mistral, and compressed-tensors' `float-quantized`.

Codes are e4m3 `[out, in]`. Scales multiply, whatever their name (`weight_scale_inv`, `weight_scale`, `scale`): one
for a tensor, one a row, one for each block of 128 x 128, or powers of two for each 32 columns (MXFP8). Blocks at
the edges may be smaller. A fused tensor has one more dimension in front, and so have its scales.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch

from fiddler.errors import UnsupportedModelError
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantised import (
    E8M0,
    FLOATS,
    Files,
    Parts,
    Quantised,
    Settings,
    block_of,
    grid,
    mismatch,
    names,
    powers,
    size,
)

MX = 32
"""Columns that share a scale in OCP's microscaling formats."""
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Fp8(Quantised):
    """Codes of 8 bits, as floats."""

    @classmethod
    def of(cls, base: str, parts: Parts, settings: Settings) -> Self | None:
        """Return the tensor of these parts, `None` where they are none of this format. Raises `ModelError`."""
        if "weight" not in parts or "scale" not in parts:
            return None
        (_, weight), (scale, scales) = parts["weight"], parts["scale"]
        if not weight.dtype.startswith("F8_E") or len(weight.shape) not in (2, 3):
            return None
        if weight.dtype != "F8_E4M3":
            raise UnsupportedModelError(f"{base} is {weight.dtype}; of 8-bit floats Fiddler reads F8_E4M3")
        block = _block(weight.shape, scales.shape, scales.dtype, settings)
        if block is None or scales.dtype not in (*FLOATS, *E8M0):
            due = f"float scales: one, one a row, or one for each {BLOCK} x {BLOCK} or {MX} columns"
            raise mismatch(base, weight.shape, (scale, scales), due)
        kind = "mxfp8" if block == (1, MX) else "fp8"
        return cls(base, weight.shape, names(parts), kind, size(parts), block)

    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return the matrix as views."""
        rows, columns = self.shape[-2:]
        codes = files.stored(self.parts["weight"], index).view(torch.uint8)
        scales = powers(files.stored(self.parts["scale"], index))
        shape = grid((rows, columns), self.block)
        return (Packed(Code.FP8, codes, scales.reshape(shape), (rows, columns), self.block),)


def _block(
    shape: tuple[int, ...], scales: tuple[int, ...], kind: str, settings: Settings
) -> tuple[int, int] | None:
    """Return the block that shares a scale, by the scales' shape; the configuration may name another size."""
    *experts, rows, columns = shape
    if experts:
        if scales[:1] != tuple(experts):
            return None
        scales = scales[1:]
    if kind in E8M0 and scales == grid((rows, columns), (1, MX)):
        return 1, MX
    named = _named_block(settings)
    if named is not None and scales == grid((rows, columns), named):
        return named
    return block_of((rows, columns), scales, (BLOCK,))


def _named_block(settings: Settings) -> tuple[int, int] | None:
    """Return the block size of the configuration, as DeepSeek or compressed-tensors write it."""
    found: Any = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found = found or (weights.get("block_structure") if isinstance(weights, dict) else None)
    if isinstance(found, list | tuple) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    return None
