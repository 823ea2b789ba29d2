"""GPTQ: integers of 4 or 8 bits, packed along the columns of a transposed matrix.

`qweight` is `[in / 8, out]` for 4 bits, `scales` `[in / group, out]`, and `qzeros` `[in / group, out / 8]`, in
words of 32 bits. Version 1 stores zeros less one: words are subtracted from as a whole, so they are added to as a
whole. With act-order (`desc_act`) `g_idx` sends each column to its group; these are refused.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Self

from torch import Tensor

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.integers import CODES, WORD, check_order, unpacked
from fiddler.formats.packed import MIDDLE, Packed
from fiddler.formats.quantised import FLOATS, Files, Parts, Quantised, Settings, mismatch, names, size
from fiddler.given import whole_number

ONES = {4: 0x11111111, 8: 0x01010101}
"""A one in each of the numbers of a word."""


@dataclass(frozen=True, slots=True)
class Gptq(Quantised):
    """Codes that are whole numbers, column by column in the file."""

    bits: int = field(default=4, kw_only=True)
    less_one: bool = field(default=True, kw_only=True)
    symmetric: bool = field(default=False, kw_only=True)

    copied = True

    @classmethod
    def of(cls, base: str, parts: Parts, settings: Settings) -> Self | None:
        """Return the tensor of these parts, `None` where they are none of this format. Raises `ModelError`."""
        (_, codes), scales, zeros = parts["qweight"], parts.get("scales"), parts.get("qzeros")
        if scales is None or zeros is None or len(codes.shape) != 2 or codes.shape[1:] != scales[1].shape[1:]:
            return None
        columns = prod(parts["g_idx"][1].shape) if "g_idx" in parts else 0
        bits = codes.shape[0] * WORD // columns if columns else whole_number(settings.get("bits", 4))
        if bits is None or bits not in CODES:
            raise UnsupportedModelError(f"{base} is GPTQ of {bits} bits; Fiddler reads 4 or 8")
        columns, rows = codes.shape[0] * WORD // bits, codes.shape[1]
        group = group_of(columns, scales[1].shape[0], settings)
        due = scales[1].shape[0], -(-rows * bits // WORD)
        if group is None or scales[1].dtype not in FLOATS or (zeros[1].dtype, zeros[1].shape) != ("I32", due):
            raise mismatch(
                base, (rows, columns), scales, f"float scales and zeros {list(due)} for groups of columns"
            )
        block, less_one = (1, group), settings.get("checkpoint_format") != "gptq_v2"
        return cls(
            *(base, (rows, columns), names(parts), f"gptq int{bits}", size(parts), block),
            bits=bits,
            less_one=less_one,
            symmetric=settings.get("sym") is True,
        )

    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return the matrix, repacked by rows."""
        rows, columns = self.shape
        if "g_idx" in self.parts:
            check_order(self.name, files.stored(self.parts["g_idx"]), columns, self.block[1])
        words = files.stored(self.parts["qweight"])
        codes = unpacked(words, self.bits).transpose(1, 2).reshape(columns, rows).t()
        scales = files.stored(self.parts["scales"]).t().contiguous()
        zeros = self._zeros(files.stored(self.parts["qzeros"]))
        return (
            Packed(CODES[self.bits], in_bytes(codes, self.bits), scales, (rows, columns), self.block, zeros=zeros),
        )

    def _zeros(self, words: Tensor) -> Tensor | None:
        """Return the zeros as bytes `[out, groups]`; `None` where all are the middle of a symmetric range."""
        if self.less_one:
            words = words + ONES[self.bits]
        zeros = unpacked(words, self.bits).flatten(1)[:, : self.shape[0]].t().contiguous()
        if self.symmetric and not bool((zeros == MIDDLE[CODES[self.bits]]).all()):
            raise CheckpointError(
                f"{self.name} has zeros of its own where config.json says sym; correct config.json"
            )
        return None if self.symmetric else zeros


def in_bytes(codes: Tensor, bits: int) -> Tensor:
    """Return codes `[out, in]` as `Packed` has them: those of 4 bits two to a byte."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes).contiguous()


def group_of(columns: int, n_groups: int, settings: Settings) -> int | None:
    """Return the columns of a group: the configuration's number, or else an equal share; `None` without either."""
    named = settings.get("group_size", settings.get("q_group_size"))
    if type(named) is int and named > 0 and n_groups == -(-columns // named):
        return named
    return columns // n_groups if n_groups and columns % n_groups == 0 else None
