"""A quantised tensor of a checkpoint before any of it is read: its name and shape, and where its parts lie.

Each format has a class of its own, whose `of` says whether some stored tensors are one, from their headers alone,
and whose `read` makes the matrices. A tensor is one matrix, or `[n, …]` of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.names import UNUSED
from fiddler.formats.packed import Packed


class Stored(Protocol):
    """A stored tensor's header; `dtype` is its name in safetensors."""

    @property
    def dtype(self) -> str:
        """Kind of number."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, the outermost first."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        ...


class Files(Protocol):
    """The checkpoint's bytes."""

    def stored(self, name: str, index: int | None = None) -> Tensor:
        """Return a stored tensor as it is, or the part of it at `index` of its first dimension: a view."""
        ...


Parts = Mapping[str, tuple[str, Stored]]
"""Role to name and header."""
Settings = Mapping[str, Any]
"""`quantization_config`, for what headers leave open."""

FLOATS = ("F32", "BF16", "F16")
E8M0 = ("F8_E8M0", "U8")
"""Powers of two as scales: older safetensors had no name for them."""


@dataclass(frozen=True, slots=True)
class Quantised(ABC):
    """A quantised tensor, of `shape` as a bf16 checkpoint has it."""

    name: str
    """As a bf16 checkpoint has it."""
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    """Role to the name of the stored tensor."""
    dtype: str
    """Kind of number, and the block of them that share a scale."""
    nbytes: int
    """Bytes of the codes, scales and zeros."""
    block: tuple[int, int] = (1, 1)
    """(rows, columns) of a matrix that share a scale."""
    turned: bool = False
    """Whether a matrix of `shape` is `[in, out]`; it is stored, and read, as `[out, in]` all the same."""

    scaled = False
    """Whether matrices have factors, which may differ from expert to expert."""
    copied = False
    """Whether the codes lie in another order than `Packed` has them, so that reading copies."""

    def named(self, name: str, parts: Mapping[str, str]) -> Self:
        """Return another tensor like this one."""
        return replace(self, name=name, parts=parts)

    @abstractmethod
    def read(self, files: Files, index: int | None) -> tuple[Packed, ...]:
        """Return a matrix, or the one at `index`; in several where its rows have different factors.

        Raises `CheckpointError` and `UnsupportedModelError` for what headers do not show, `ValueError` for parts
        that do not belong together.
        """

    def dense(self, files: Files, dtype: torch.dtype) -> Tensor:
        """Return the whole tensor in floats."""
        made = torch.empty(self.shape, dtype=dtype, device="cpu")
        stack = made if len(self.shape) == 3 else made[None]
        for index, to in enumerate(stack.mT if self.turned else stack):
            first = 0
            for matrix in self.read(files, index if len(self.shape) == 3 else None):
                _decode(matrix, to[first : first + matrix.shape[0]])
                first += matrix.shape[0]
        return made


AT_ONCE = 1 << 22
"""Numbers that are decoded at once: they take 8 bytes each until they are rounded."""


def _decode(matrix: Packed, to: Tensor) -> None:
    """Write a matrix in floats into `to`, a few rows at a time."""
    (out, columns), rows = matrix.shape, matrix.block[0]
    step = max(AT_ONCE // columns // rows * rows, rows)
    for start in range(0, out, step):
        to[start : start + step] = matrix.between(start, min(start + step, out)).dense(to.dtype)


_BESIDE = (UNUSED, "g_idx", "shape", "state", "quant_map", "nested_quant_map")
"""Beginnings of the roles of parts that only describe the others."""


def size(parts: Parts) -> int:
    """Return the bytes of all parts that are multiplied with."""
    return sum(header.nbytes for role, (_, header) in parts.items() if not role.startswith(_BESIDE))


def names(parts: Parts) -> dict[str, str]:
    """Return the parts' names."""
    return {role: name for role, (name, _) in parts.items()}


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return the numbers of blocks along a matrix, `shape`'s last two dimensions."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def mismatch(name: str, shape: tuple[int, ...], scales: tuple[str, Stored], due: object) -> CheckpointError:
    """Return the complaint about scales of a wrong shape."""
    scale, header = scales
    return CheckpointError(
        f"tensor {scale!r} is {header.dtype} {list(header.shape)} where {name} of {list(shape)} has {due}; "
        "they are not of these codes, or damaged: download the checkpoint again"
    )


def block_of(shape: tuple[int, int], scales: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the block whose grid over a matrix is `scales`: a number, one a row, or square blocks of `sizes`."""
    if prod(scales) == 1:
        return shape
    if scales in ((shape[0],), (shape[0], 1)):
        return 1, shape[1]
    return next(((n, n) for n in sizes if scales == grid(shape, (n, n))), None)


def powers(scales: Tensor) -> Tensor:
    """Return e8m0 scales as such, wherever their dtype is only bytes."""
    return scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales


def single(number: Tensor) -> float:
    """Return a factor, of float32 as blocks keep it."""
    return float(number.float())


def refuse_unread(entries: Mapping[str, Stored | Quantised]) -> None:
    """Raise `UnsupportedModelError` for a weight that is left as codes: no format that is read has its parts."""
    for name, header in entries.items():
        if isinstance(header, Quantised):
            continue
        codes = header.dtype[:4] in ("F8_E", "F4", "F6_E") or (
            header.dtype.startswith(("I", "U")) and name.endswith(("weight", "weight_packed", "_blocks", "qweight"))
        )
        if codes:
            raise UnsupportedModelError(
                f"tensor {name!r} is {header.dtype} {list(header.shape)}, quantised in a way that Fiddler does not "
                "read, or without its scales; use the bf16 version of the model, or another quantised one"
            )
