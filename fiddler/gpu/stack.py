"""The weights in all slots of an arena at once, as strided views: nothing is copied, and nothing is read."""

from dataclasses import dataclass, field
from itertools import chain
from math import prod

import torch
from torch import Tensor

from fiddler.formats.packed import Code, Packed
from fiddler.store.layout import BlockLayout, Part, Place
from fiddler.types import ExpertWeights

ROW_ALIGNMENT = 16
"""Bytes that a grouped matmul's rows are multiples of. Source: `check_valid_strides_and_return_transposed` in
`GroupedMMUtils.h`."""


@dataclass(frozen=True, slots=True)
class PackedStack:
    """A quantised matrix in all slots; the parts are those of `Packed`, with the slot as their first dimension.

    `scales` are `None` where the blocks of GGUF's codes hold them.
    """

    code: Code
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    factors: Tensor
    """float32 `[n_slots]`: the factor lies in each block, where only the device can read it without a wait."""
    matrix: tuple[int, int]
    """(out, in)."""
    block: tuple[int, int]
    """(rows, columns) that share a scale."""
    arguments: tuple[Tensor | None, ...] = field(init=False)
    """Codes, scales, zeros and factors as a kernel takes them: scales of 8 bits are bytes."""
    strides: tuple[int, ...] = field(init=False)
    """Elements from slot to slot and from row to row: codes, scales, zeros; from slot to slot: factors."""

    def __post_init__(self) -> None:
        scales = self.scales
        scales = scales.view(torch.uint8) if scales is not None and scales.itemsize == 1 else scales
        rows = self.codes, scales, self.zeros
        object.__setattr__(self, "arguments", (*rows, self.factors))
        strides = [(0, 0) if part is None else part.stride()[:2] for part in rows]
        object.__setattr__(self, "strides", (*chain(*strides), self.factors.stride(0)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slots, out, in), as a plain stack of matrices has it."""
        return len(self.codes), *self.matrix

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Every tensor of it."""
        found = self.codes, self.scales, self.zeros, self.factors
        return tuple(part for part in found if part is not None)

    @property
    def outline(self) -> tuple[object, ...]:
        """All but where the parts begin."""
        return self.code, self.matrix, self.block, [(part.dtype, part.stride()) for part in self.parts]

    def dense(self, slot: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix `[out, in]` in one slot, computed in float32 and rounded once."""
        codes, factor = self.codes[slot], self.factors[slot]
        if self.scales is None:
            numbers = Packed(self.code, codes, None, self.matrix, self.block).dense(torch.float32)
            return numbers.mul_(factor).to(dtype)
        zeros = None if self.zeros is None else self.zeros[slot]
        scales = self.scales[slot].float() * factor
        return Packed(self.code, codes, scales, self.matrix, self.block, zeros).dense(dtype)

    def halves(self) -> "tuple[PackedStack, PackedStack] | None":
        """Return the upper and the lower rows, if no block has some of both."""
        rows, odd = divmod(self.matrix[0], 2)
        if odd or (rows % self.block[0] and self.block[0] < self.matrix[0]):
            return None
        first, second = (self._rows(start, start + rows) for start in (0, rows))
        return first, second

    def _rows(self, start: int, stop: int) -> "PackedStack":
        """Return rows between borders of blocks, or of the one block."""
        high = self.block[0]
        grid = slice(start // high, -(-stop // high))
        scales, zeros = (None if part is None else part[:, grid] for part in (self.scales, self.zeros))
        codes, matrix = self.codes[:, start:stop], (stop - start, self.matrix[1])
        return PackedStack(self.code, codes, scales, zeros, self.factors, matrix, self.block)


StackedMatrix = Tensor | PackedStack
"""A matrix `[n_slots, out, in]`."""
Twin = tuple[StackedMatrix, Tensor | None]
"""A matrix, and its bias."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The weights in all slots of an arena, as `ExpertWeights` has those in one.

    Slots that hold something else are in it all the same, and must not be visited.
    """

    up: tuple[StackedMatrix, ...]
    """One fused or ungated matrix `[n_slots, (2)I, H]`, or gate and up `[n_slots, I, H]` each."""
    down: StackedMatrix
    """`[n_slots, H, I]`."""
    up_bias: tuple[Tensor, ...] = ()
    """Matching `up`, `[n_slots, (2)I]` or `[n_slots, I]` each."""
    down_bias: Tensor | None = None
    """`[n_slots, H]`."""
    aligned: bool = field(init=False)
    """Whether a grouped matmul takes the matrices, packed ones when they have been decoded."""
    packed: bool = field(init=False)
    """Whether a matrix is quantised."""
    twins: "tuple[Twin, Twin] | None" = field(init=False)
    """Gate and up of a gated stack, each with its bias, where they differ in nothing but where they begin."""

    def __post_init__(self) -> None:
        matrices = *self.up, self.down
        object.__setattr__(self, "twins", _twins(self.up, self.up_bias))
        object.__setattr__(self, "aligned", all(_aligned(matrix) for matrix in matrices))
        object.__setattr__(self, "packed", any(isinstance(matrix, PackedStack) for matrix in matrices))

    @classmethod
    def over(cls, slots: Tensor, layout: BlockLayout) -> "Stack":
        """Return views of `slots`, uint8 `[n_slots, slot_bytes]`, each of which starts with a block of `layout`.

        Raises `ValueError` where a part is not in a slot, or slots are not aligned to its dtype.
        """
        return cls(
            up=tuple(_matrix(slots, place) for place in layout.up),
            down=_matrix(slots, layout.down),
            up_bias=tuple(_stacked(slots, part) for part in layout.up_bias),
            down_bias=None if layout.down_bias is None else _stacked(slots, layout.down_bias),
        )

    def of(self, slot: int) -> ExpertWeights:
        """Return the weights in one slot of a stack that is not packed."""
        up, down = self._plain()
        return ExpertWeights(
            up=tuple(part[slot] for part in up),
            down=down[slot],
            up_bias=tuple(part[slot] for part in self.up_bias),
            down_bias=None if self.down_bias is None else self.down_bias[slot],
        )

    def between(self, first: int, stop: int) -> "Stack":
        """Return slots `first … stop-1` of a stack that is not packed."""
        up, down = self._plain()
        return Stack(
            up=tuple(part[first:stop] for part in up),
            down=down[first:stop],
            up_bias=tuple(part[first:stop] for part in self.up_bias),
            down_bias=None if self.down_bias is None else self.down_bias[first:stop],
        )

    def _plain(self) -> tuple[list[Tensor], Tensor]:
        up = [part for part in self.up if isinstance(part, Tensor)]
        assert isinstance(self.down, Tensor)
        return up, self.down


def _twins(up: tuple[StackedMatrix, ...], bias: tuple[Tensor, ...]) -> tuple[Twin, Twin] | None:
    pair = (up[0], up[1]) if len(up) == 2 else _halves(up[0])
    if pair is None or not _alike(*pair):
        return None
    if not bias:
        return (pair[0], None), (pair[1], None)
    gate_bias, up_bias = bias if len(bias) == 2 else bias[0].chunk(2, dim=1)
    return ((pair[0], gate_bias), (pair[1], up_bias)) if gate_bias.stride() == up_bias.stride() else None


def _halves(matrix: StackedMatrix) -> tuple[StackedMatrix, StackedMatrix] | None:
    """Return upper and lower rows; `None` where there are no two halves."""
    if isinstance(matrix, PackedStack):
        return matrix.halves()
    if matrix.shape[1] % 2:
        return None
    first, second = matrix.chunk(2, dim=1)
    return first, second


def _alike(gate: StackedMatrix, up: StackedMatrix) -> bool:
    if isinstance(gate, PackedStack):
        return isinstance(up, PackedStack) and gate.outline == up.outline
    return isinstance(up, Tensor) and gate.stride() == up.stride()


def _matrix(slots: Tensor, place: Place) -> StackedMatrix:
    if isinstance(place, Part):
        return _stacked(slots, place)
    codes, *grids = (_stacked(slots, part) for part in place.parts)
    scales, zeros = (*grids, None, None)[:2]
    factors = _stacked(slots, place.factor)[:, 0]
    return PackedStack(place.code, codes, scales, zeros, factors, place.shape, place.block)


def _stacked(slots: Tensor, part: Part) -> Tensor:
    """Return the tensors that lie where a part lies, in all slots."""
    item, (n_slots, slot_bytes) = part.dtype.itemsize, slots.shape
    if part.offset < 0 or part.offset + prod(part.shape) * item > slot_bytes:
        raise ValueError(
            f"a part of {tuple(part.shape)} at byte {part.offset} is not in a slot of {slot_bytes} bytes"
        )
    if part.offset % item or slots.stride(0) % item:
        raise ValueError(
            f"slots of {slots.stride(0)} bytes, or byte {part.offset} of one, are not aligned to {item}"
        )
    typed = slots.view(part.dtype)
    strides = [prod(part.shape[at + 1 :]) for at in range(len(part.shape))]
    start = typed.storage_offset() + part.offset // item
    stacked = typed.as_strided((n_slots, *part.shape), (typed.stride(0), *strides), start)
    return stacked.transpose(1, 2) if part.transposed else stacked


def _aligned(matrix: StackedMatrix) -> bool:
    """Whether a grouped matmul takes `[n_slots, out, in]`, and rows of `in` numbers without gaps."""
    if isinstance(matrix, PackedStack):
        return matrix.shape[2] * torch.bfloat16.itemsize % ROW_ALIGNMENT == 0
    short, long = sorted(matrix.stride()[1:])
    strides = (long, matrix.stride(0), matrix.shape[2])
    addresses = (matrix.data_ptr(), *(stride * matrix.element_size() for stride in strides))
    return short == 1 and all(address % ROW_ALIGNMENT == 0 for address in addresses)
