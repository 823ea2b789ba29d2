"""Integers of compressed-tensors: `pack-quantized`, 4 or 8 bits, and `int-quantized`, 8.

`weight_packed` has the codes of a row in words of 32 bits, the first in the lowest bits, each as much above zero as
it can be below. `weight_scale` is `[out, in / group]`, `[out, 1]` or one number. `weight_zero_point`, where ranges
are not symmetric, is packed in the same way along the rows: `[out / 8, in / group]` for 4 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantised import FLOATS, Files, Parts, Quantised, Settings, mismatch, names, size
from fiddler.given import shown, whole_number

WORD = 32
CODES = {4: Code.INT4, 8: Code.UINT8}


@dataclass(frozen=True, slots=True)
class Integers(Quantised):
    """Codes that are whole numbers."""

    bits: int = field(default=8, kw_only=True)

    @classmethod
    def of(cls, base: str, parts: Parts, settings: Settings) -> Self | None:
        """Return the tensor of these parts, `None` where they are none of this format. Raises `ModelError`."""
        role = "packed" if "packed" in parts else "weight"
        (_, header), scale = parts[role], parts.get("scale")
        if header.dtype != ("I32" if role == "packed" else "I8") or scale is None or scale[1].dtype not in FLOATS:
            return None
        if len(header.shape) != 2:
            raise UnsupportedModelError(f"{base} is {header.dtype} {list(header.shape)}, where a matrix is due")
        if role == "weight" and "zero_point" in parts:
            raise UnsupportedModelError(f"{base} has 8-bit zero points, which Fiddler does not read")
        bits = _bits(base, header.shape[1], scale[1].shape, settings) if role == "packed" else 8
        rows, columns = header.shape[0], header.shape[1] * (WORD // bits if role == "packed" else 1)
        block = _block((rows, columns), scale[1].shape, settings)
        if block is None:
            raise mismatch(base, (rows, columns), scale, "one scale, or one a row and group of columns")
        zeros, grid = parts.get("zero_point"), scale[1].shape
        alike = [scheme.get("symmetric") for scheme in described(settings) if _number(scheme, "num_bits") == bits]
        if zeros is None and alike and all(symmetric is False for symmetric in alike):
            raise CheckpointError(
                f"{base} lacks the weight_zero_point that config.json promises (symmetric=false); download the "
                "checkpoint again"
            )
        if zeros is not None and (
            zeros[1].dtype != "I32" or zeros[1].shape != (-(-rows * bits // WORD), *grid[1:])
        ):
            raise mismatch(base, (rows, columns), zeros, f"zero points packed along {rows} rows")
        return cls(base, (rows, columns), names(parts), f"int{bits}", size(parts), block, bits=bits)

    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return the matrix as views, with zeros of a byte each."""
        rows, columns = self.shape
        if "shape" in self.parts and (own := files.stored(self.parts["shape"]).tolist()) != [rows, columns]:
            raise CheckpointError(
                f"{self.name} is {rows} x {columns} by its codes of {self.bits} bits, and {shown(own)} by its "
                "weight_shape; correct num_bits in config.json, or download the checkpoint again"
            )
        if "g_idx" in self.parts:
            check_order(self.name, files.stored(self.parts["g_idx"]), columns, self.block[1])
        scales = files.stored(self.parts["scale"]).reshape(-(-rows // self.block[0]), -1)
        if "weight" in self.parts:
            codes = files.stored(self.parts["weight"]).view(torch.uint8)
            return (Packed(Code.INT8, codes, scales, (rows, columns), self.block),)
        codes = files.stored(self.parts["packed"]).view(torch.uint8)
        zeros = self._zeros(files.stored(self.parts["zero_point"])) if "zero_point" in self.parts else None
        return (Packed(CODES[self.bits], codes, scales, (rows, columns), self.block, zeros=zeros),)

    def _zeros(self, words: Tensor) -> Tensor:
        """Return zero points, packed along the rows, as bytes `[out, groups]`."""
        return unpacked(words, self.bits).transpose(1, 2).reshape(-1, words.shape[1])[: self.shape[0]].contiguous()


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the numbers in words of 32 bits, lowest first, in a dimension of their own: uint8 `[…, 32 / bits]`."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device="cpu")
    return (words[..., None] >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)


def check_order(name: str, groups: Tensor, columns: int, group: int) -> None:
    """Raise `UnsupportedModelError` unless columns lie in the order of their groups."""
    due = torch.arange(columns, dtype=torch.int64, device="cpu") // group
    if not torch.equal(groups.long(), due):
        raise UnsupportedModelError(
            f"{name} has its columns in the order of their activations (desc_act, act-order: g_idx is not 0, 0, …, "
            "1, 1, …), so a group's columns lie apart; quantise with desc_act=False or static_groups"
        )


def described(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield the weights' schemes of a configuration of compressed-tensors."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def widths(settings: Settings) -> set[int]:
    """Return the bits of a configuration's integers; what has floats has no words."""
    return {_number(scheme, "num_bits") for scheme in described(settings) if scheme.get("type") != "float"}


SHAPE = "weight_shape"
"""Key of the settings under which a tensor's own `weight_shape` stands, where schemes are mixed."""


def _bits(base: str, n_words: int, scales: tuple[int, ...], settings: Settings) -> int:
    """Return the bits of a code, which words do not show.

    Where schemes are mixed, the columns tell, or else the groups of columns.
    """
    found = widths(settings)
    if len(found) > 1 and isinstance(shape := settings.get(SHAPE), list):
        found = {bits for bits in found & CODES.keys() if shape[-1:] == [n_words * WORD // bits]}
    elif len(found) > 1 and len(scales) == 2:
        named = [(_number(scheme, "num_bits"), _number(scheme, "group_size")) for scheme in described(settings)]
        columns = [(bits, n_words * WORD // bits, group) for bits, group in named if bits in found & CODES.keys()]
        found = {bits for bits, width, group in columns if scales[1] == -(-width // (group or width))}
    if len(found) != 1 or not found.issubset(CODES):
        raise UnsupportedModelError(
            f"{base} has integers of {sorted(found) or 'unknown'} bits; Fiddler reads 4 or 8, which "
            "config_groups in config.json must name"
        )
    return found.pop()


def _number(scheme: dict[str, Any], name: str) -> int:
    """Return a number of a scheme, 0 for what is none above zero."""
    return max(whole_number(scheme.get(name)) or 0, 0)


def _block(shape: tuple[int, int], scales: tuple[int, ...], settings: Settings) -> tuple[int, int] | None:
    rows, columns = shape
    if scales in ((), (1,), (1, 1)):
        return shape
    if scales[0] != rows or len(scales) > 2 or scales[-1] < 1:
        return None
    n_groups = scales[1] if len(scales) == 2 else 1
    for scheme in described(settings):
        if (group := _number(scheme, "group_size")) and n_groups == -(-columns // group):
            return 1, group
    return (1, columns // n_groups) if columns % n_groups == 0 else None
