"""A tensor of a GGUF file before any of it is read, in blocks of any type that gguf-py decodes, or in floats.

Experts' matrices in blocks that `formats.ggml` knows are read as they lie. All else becomes floats, once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fiddler.errors import UnsupportedModelError
from fiddler.formats import ggml
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantised import Files, Quantised

CODES = {code.value: code for code in Code if code.run is not None}
"""The types of blocks that experts may have, by their names."""

_AT_ONCE = 1 << 18
"""Numbers that are decoded at once: what comes between codes and floats stays in a processor's cache."""

Undo = Callable[[Tensor], Tensor]
"""Takes back what llama.cpp's converter did to a tensor's numbers."""


def package() -> Any:
    """Return gguf-py. Raises `UnsupportedModelError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedModelError("GGUF files need the package gguf: pip install 'fiddler-moe[gguf]'") from error
    return gguf


@dataclass(frozen=True, slots=True)
class GgufTensor(Quantised):
    """A tensor whose one part, `codes`, is rows of blocks (uint8), or floats."""

    undo: Undo | None = field(default=None, kw_only=True)
    """Changes values, order or dimensions; `shape` is that before."""

    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return a matrix, or the one at `index`, as it lies in the file."""
        if self.dtype not in CODES or self.undo is not None:
            raise UnsupportedModelError(f"tensor {self.name!r} is {self.dtype}, which is not run packed")
        rows = files.stored(self.parts["codes"], index)
        return (Packed(CODES[self.dtype], rows, None, (rows.shape[0], self.shape[-1]), self.block),)

    def dense(self, files: Files, dtype: torch.dtype) -> Tensor:
        """Return the whole tensor in floats, in memory of its own."""
        stored = files.stored(self.parts["codes"])
        exact = dtype if self.undo is None else torch.float32  # a norm less one is much smaller than itself
        made = torch.empty(self.shape, dtype=exact, device="cpu")
        if stored.is_floating_point():
            made.copy_(stored)
        else:
            self._decode(stored.view(-1, stored.shape[-1]), made.view(-1, self.shape[-1]))
        return made if self.undo is None else self.undo(made).to(dtype).contiguous()

    def _decode(self, rows: Tensor, to: Tensor) -> None:
        """Write rows of blocks in floats into `to`, some rows at a time."""
        step = max(_AT_ONCE // self.shape[-1], 1)
        for start in range(0, len(rows), step):
            to[start : start + step] = numbers(self.dtype, rows[start : start + step])


def numbers(kind: str, rows: Tensor) -> Tensor:
    """Return rows of blocks, uint8 `[out, bytes]`, as float32 `[out, in]`; `kind` is the type's name."""
    if kind in ggml.BLOCKS:
        return ggml.numbers(kind, rows)
    gguf = package()
    try:
        return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind.upper()]))
    except NotImplementedError:
        raise UnsupportedModelError(f"gguf does not decode {kind.upper()}; use another file of the model") from None
