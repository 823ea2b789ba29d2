"""MXFP4: 4-bit floats, and a power of two for each 32 columns (OCP Microscaling Formats 1.0).

gpt-oss stores it fused, as `gate_up_proj_blocks` `[n, out, in / 32, 16]` and `gate_up_proj_scales`; its floats
are `[n, in, out]`. compressed-tensors has `weight_packed` and `weight_scale`, DeepSeek V4 `weight` and `scale`. The
first of two columns is in the low half of a byte in all of them.
"""

from dataclasses import dataclass
from typing import Self

import torch

from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantised import E8M0, Files, Parts, Quantised, Settings, mismatch, names, powers, size

GROUP = 32


@dataclass(frozen=True, slots=True)
class MxFp4(Quantised):
    """Codes of 4 bits, as floats, under powers of two."""

    @classmethod
    def of(cls, base: str, parts: Parts, settings: Settings) -> Self | None:
        """Return the tensor of these parts, `None` where they are none of this format. Raises `CheckpointError`."""
        role = next(role for role in ("blocks", "packed", "weight") if role in parts)
        (codes, header), scale = parts[role], parts.get("scale")
        mine = header.dtype in ("U8", "I8") and scale is not None and scale[1].dtype in E8M0
        if not mine or scale is None or {"scale_2", "global_scale"}.intersection(parts):
            return None
        shape = header.shape
        if role == "blocks":
            if len(shape) != 4 or shape[3] != GROUP // 2:
                raise mismatch(codes, shape, (codes, header), f"blocks of {GROUP // 2} bytes")
            shape = (*shape[:2], shape[2] * shape[3])
        shape = (*shape[:-1], 2 * shape[-1])
        due = (*shape[:-1], -(-shape[-1] // GROUP))
        if len(shape) not in (2, 3) or scale[1].shape != due:
            raise mismatch(base, shape, scale, f"scales {list(due)}")
        turned = role == "blocks"
        seen = (shape[0], shape[2], shape[1]) if turned else shape
        return cls(base, seen, names(parts), "mxfp4", size(parts), (1, GROUP), turned=turned)

    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return the matrix as views."""
        rows, columns = self.shape[:-3:-1] if self.turned else self.shape[-2:]
        role = next(role for role in ("blocks", "packed", "weight") if role in self.parts)
        codes = files.stored(self.parts[role], index).view(torch.uint8).reshape(rows, -1)
        scales = powers(files.stored(self.parts["scale"], index))
        return (Packed(Code.FP4, codes, scales, (rows, columns), self.block),)
