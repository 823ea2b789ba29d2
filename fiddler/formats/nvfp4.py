"""NVFP4: 4-bit floats, an e4m3 scale for each 16 columns, and a factor for the whole matrix.

ModelOpt has `weight`, `weight_scale` and `weight_scale_2`, which multiplies; compressed-tensors `weight_packed`,
`weight_scale` and `weight_global_scale`, which divides. ModelOpt also writes a layer's experts as one: `[n, out,
in / 2]`, or `[n * out, in / 2]`, with factors `[n]`, or `[n, 2]` for the two halves of gate and up.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Self

from torch import Tensor

from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantised import Files, Parts, Quantised, Settings, mismatch, names, single, size

GROUP = 16


@dataclass(frozen=True, slots=True)
class NvFp4(Quantised):
    """Codes of 4 bits, as floats, under scales and a factor."""

    factor: str = field(default="scale_2", kw_only=True)
    """Role of the factor."""

    scaled = True

    @classmethod
    def of(cls, base: str, parts: Parts, settings: Settings) -> Self | None:
        """Return the tensor of these parts, `None` where they are none of this format. Raises `CheckpointError`."""
        role, factor = ("packed", "global_scale") if "packed" in parts else ("weight", "scale_2")
        (_, header), scale, own = parts[role], parts.get("scale"), parts.get(factor)
        if header.dtype != "U8" or scale is None or own is None or scale[1].dtype != "F8_E4M3":
            return None
        shape = (*header.shape[:-1], 2 * header.shape[-1])
        due = (*shape[:-1], -(-shape[-1] // GROUP))
        stacked = own[1].shape
        n = stacked[0] if stacked and prod(stacked) > 1 else 1
        if len(shape) == 2 and n > 1 and shape[0] % n == 0:
            shape = (n, shape[0] // n, shape[1])
        experts = shape[0] if len(shape) == 3 else 1
        if scale[1].shape not in (due, (*shape[:-1], due[-1])) or len(shape) not in (2, 3):
            raise mismatch(base, shape, scale, f"scales {list(due)}")
        n_factors = prod(stacked)
        if own[1].dtype != "F32" or n_factors not in (experts, 2 * experts) or (n_factors > 1 and n != experts):
            raise mismatch(base, shape, own, "a float32 factor for each matrix, or for each half")
        return cls(base, shape, names(parts), "nvfp4", size(parts), (1, GROUP), factor=factor)

    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return the matrix as views, or its halves where they have factors of their own."""
        rows, columns = self.shape[-2:]
        role = "packed" if self.factor == "global_scale" else "weight"
        codes, scales = (self._matrix(files, self.parts[part], index) for part in (role, "scale"))
        own = files.stored(self.parts[self.factor])
        factors = (own[index or 0] if own.dim() and len(own) > 1 else own).flatten()
        if self.factor == "global_scale":
            factors = 1 / factors
        if bool((factors == factors[0]).all()):
            factors = factors[:1]
        if rows % len(factors):
            raise ValueError(f"{len(factors)} factors for {rows} rows")
        share = rows // len(factors)
        return tuple(
            Packed(Code.FP4, part, scale, (share, columns), self.block, factor=single(factor))
            for part, scale, factor in zip(codes.split(share), scales.split(share), factors, strict=True)
        )

    def _matrix(self, files: Files, name: str, index: int | None) -> Tensor:
        """Return a part of the matrix at `index`, wherever experts are stacked on each other."""
        if len(self.shape) == 2:
            return files.stored(name)
        n, rows, _ = self.shape
        assert index is not None
        whole = files.stored(name)
        return whole[index] if whole.dim() == 3 else whole.view(n, rows, -1)[index]
