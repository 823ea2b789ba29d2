"""NF4 of bitsandbytes: codes of 4 bits in blocks of 64, whose scales may be quantised in turn.

`weight` is `[out * in / 2, 1]`, the first of two columns in the high half of a byte. `absmax` has the scales, or
codes of 8 bits of them, which stand for `nested_quant_map[code] * nested_absmax + offset`. Only the JSON of
`quant_state.bitsandbytes__nf4`, stored as bytes, has the shape.
"""

import json
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.packed import VALUES, Code, Packed
from fiddler.formats.quantised import FLOATS, Files, Parts, Quantised, Settings, names, size
from fiddler.given import shown, whole_number

MOST_BYTES = 1 << 16
"""Of a state's JSON; it has a few hundred."""
NEAR = 1e-3
"""Within which the 16 values must be NF4's."""


@dataclass(frozen=True, slots=True)
class Nf4(Quantised):
    """Codes of 4 bits, as quantiles of a normal distribution."""

    copied = True

    @classmethod
    def of(cls, base: str, parts: Parts, settings: Settings) -> Self | None:
        """Return the tensor of these parts, by its state in `settings`. Raises `ModelError`."""
        if "weight" not in parts or "absmax" not in parts:
            raise CheckpointError(f"{base} lacks its codes or its absmax; download the checkpoint again")
        state: Any = settings["state"]
        shape, block = state.get("shape"), whole_number(state.get("blocksize"))
        if state.get("quant_type") != "nf4":
            raise UnsupportedModelError(f"{base} is {shown(state.get('quant_type'))} of bitsandbytes, and not nf4")
        sizes = [whole_number(n) or 0 for n in shape] if isinstance(shape, list) else []
        if len(sizes) != 2 or min(sizes) < 1 or not block or block < 2:
            raise CheckpointError(f"{base} has the state {shown(state)}, which is no matrix's")
        rows, columns = sizes
        if columns % block:
            raise UnsupportedModelError(f"{base} has {columns} columns, which blocks of {block} do not divide")
        n_codes, n_scales = parts["weight"][1], parts["absmax"][1]
        if (
            n_codes.dtype != "U8"
            or n_scales.dtype not in ("U8", *FLOATS)
            or n_codes.nbytes * 2 != rows * columns
            or n_scales.shape != (rows * columns // block,)
        ):
            raise CheckpointError(
                f"{base} of {sizes} has codes {n_codes.dtype} {list(n_codes.shape)} and absmax {n_scales.dtype} "
                f"{list(n_scales.shape)}, not of one matrix, or damaged: download the checkpoint again"
            )
        return cls(base, (rows, columns), names(parts), "nf4", size(parts), (1, block))

    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return the matrix, halves of bytes swapped and scales decoded."""
        rows, columns = self.shape
        if "quant_map" in self.parts:
            values = files.stored(self.parts["quant_map"]).float()
            if not torch.allclose(values, torch.tensor(VALUES[Code.NF4]), atol=NEAR):
                raise UnsupportedModelError(f"{self.name} has other values than NF4's")
        codes = files.stored(self.parts["weight"]).view(rows, columns // 2)
        swapped = (codes >> 4) | (codes << 4)
        scales = self._scales(files).view(rows, -1)
        return (Packed(Code.NF4, swapped, scales, (rows, columns), self.block),)

    def _scales(self, files: Files) -> Tensor:
        absmax = files.stored(self.parts["absmax"])
        if absmax.dtype != torch.uint8:
            return absmax.float()
        state = read_state(self.name, files.stored(self.parts["state"]))
        nested, inner = whole_number(state.get("nested_blocksize")) or 0, self.parts.get("nested_absmax")
        if nested < 1 or inner is None or "nested_quant_map" not in self.parts:
            raise CheckpointError(
                f"{self.name} lacks what its absmax is quantised by; download the checkpoint again"
            )
        outer = files.stored(inner).float().repeat_interleave(nested)[: len(absmax)]
        values = files.stored(self.parts["nested_quant_map"]).float()
        if len(outer) != len(absmax) or len(values) != 256:
            raise CheckpointError(f"{self.name} has a nested_absmax of another size; download the checkpoint again")
        return values[absmax.int()] * outer + float(state.get("nested_offset", 0.0))


def read_state(name: str, stored: Tensor) -> dict[str, Any]:
    """Return a state's JSON. Raises `CheckpointError`."""
    try:
        if stored.nbytes > MOST_BYTES:
            raise ValueError(f"{stored.nbytes} bytes")
        found = json.loads(bytes(stored.view(torch.uint8).tolist()))
        if not isinstance(found, dict):
            raise TypeError("no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{name} has a state that is not JSON: {error}; download the checkpoint again"
        ) from error
    return found
