"""AWQ (the layout `gemm`): integers of 4 bits, packed along the rows of a transposed matrix in an order of its own.

`qweight` is `[in, out / 8]`, `scales` `[in / group, out]` and `qzeros` `[in / group, out / 8]`. From the lowest
bits up, a word has the rows 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from fiddler.errors import UnsupportedModelError
from fiddler.formats.gptq import group_of, in_bytes
from fiddler.formats.integers import unpacked
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantised import FLOATS, Files, Parts, Quantised, Settings, mismatch, names, size

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""By row of eight, its place in a word."""
BITS, EACH = 4, 8


@dataclass(frozen=True, slots=True)
class Awq(Quantised):
    """Codes that are whole numbers, column by column in the file."""

    copied = True

    @classmethod
    def of(cls, base: str, parts: Parts, settings: Settings) -> Self | None:
        """Return the tensor of these parts, `None` where they are none of this format. Raises `ModelError`."""
        (_, codes), scales, zeros = parts["qweight"], parts.get("scales"), parts.get("qzeros")
        if scales is None or zeros is None or len(codes.shape) != 2 or len(scales[1].shape) != 2:
            return None
        bits, version = settings.get("bits", settings.get("w_bit", BITS)), settings.get("version", "gemm")
        if bits != BITS or str(version).lower() != "gemm":
            raise UnsupportedModelError(f"{base} is AWQ of {bits} bits, {version}; Fiddler reads 4 bits, gemm")
        columns, rows = codes.shape[0], EACH * codes.shape[1]
        group = group_of(columns, scales[1].shape[0], settings)
        due = scales[1].shape[0], codes.shape[1]
        sound = scales[1].dtype in FLOATS and scales[1].shape[1] == rows and codes.dtype == "I32"
        if group is None or not sound or (zeros[1].dtype, zeros[1].shape) != ("I32", due):
            raise mismatch(
                base, (rows, columns), scales, f"float scales and zeros {list(due)} for groups of columns"
            )
        return cls(base, (rows, columns), names(parts), "awq int4", size(parts), (1, group))

    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return the matrix, repacked by rows."""
        rows, columns = self.shape
        codes = _rows(files.stored(self.parts["qweight"]))
        zeros = _rows(files.stored(self.parts["qzeros"])).contiguous()
        scales = files.stored(self.parts["scales"]).t().contiguous()
        return (Packed(Code.INT4, in_bytes(codes, BITS), scales, (rows, columns), self.block, zeros=zeros),)


def _rows(words: Tensor) -> Tensor:
    """Return the numbers of `[m, out / 8]` words as `[out, m]`."""
    return unpacked(words, BITS)[..., PLACES].flatten(1).t()
