"""Where an expert's parts lie in its block: one run of bytes that is copied whole and read through views."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fiddler.formats.packed import Code, Matrix, Packed
from fiddler.types import ExpertWeights

ALIGNMENT = 64
"""Bytes: every part starts at a multiple of a cache line, which is also an AVX-512 register."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor lies in a block; `shape` is that in memory, before the view is `transposed`."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool

    @classmethod
    def of(cls, tensor: Tensor, offset: int) -> "Part":
        """Place a tensor at `offset` in its own memory order, without the gaps its strides may have.

        The order is kept because torch picks its matmul by it: results are then those of the tensor itself.
        """
        transposed = tensor.dim() == 2 and tensor.stride(0) < tensor.stride(1)
        stored = tensor.t() if transposed else tensor
        return cls(offset, tuple(stored.shape), tensor.dtype, transposed)

    def view(self, block: Tensor) -> Tensor:
        """Return the part of a block `[nbytes]`."""
        end = self.offset + prod(self.shape) * self.dtype.itemsize
        stored = block[self.offset : end].view(self.dtype).view(self.shape)
        return stored.t() if self.transposed else stored


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Where a quantised matrix lies in a block: its codes, scales and zeros, and its factor among the block's."""

    parts: tuple[Part, ...]
    code: Code
    shape: tuple[int, int]
    block: tuple[int, int]
    factor: Part

    def view(self, block: Tensor) -> Packed:
        """Return the matrix in a block; its factor is read, since experts of one layout have their own."""
        parts = [part.view(block) for part in self.parts]
        factor = float(self.factor.view(block))
        codes, scales, zeros = parts[0], *(*parts[1:], None, None)[:2]
        return Packed(self.code, codes, scales, self.shape, self.block, zeros=zeros, factor=factor)


Place = Part | PackedPart
Pair = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Tensors of a block, and those that are copied to them: the same rows, perhaps cut otherwise."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The parts of a block, as `ExpertWeights` has them; experts of one layer share a layout."""

    up: tuple[Place, ...]
    down: Place
    up_bias: tuple[Part, ...]
    down_bias: Part | None
    nbytes: int
    """Size of a block, a multiple of `ALIGNMENT`."""

    @classmethod
    def of(cls, sample: ExpertWeights) -> "BlockLayout":
        """Return the layout for experts of the shapes, dtypes and memory order of `sample`."""
        room = _Room()
        up, down = tuple(map(room.matrix, sample.up)), room.matrix(sample.down)
        up_bias = tuple(map(room.tensor, sample.up_bias))
        down_bias = None if sample.down_bias is None else room.tensor(sample.down_bias)
        return cls(up, down, up_bias, down_bias, room.end)

    @property
    def reads(self) -> bool:
        """Whether `views` reads a block: factors are numbers of each expert's own."""
        return any(isinstance(part, PackedPart) for part in (*self.up, self.down))

    def views(self, block: Tensor) -> ExpertWeights:
        """Return the weights in a block, without copying: uint8, aligned to `ALIGNMENT`, at least `nbytes` long."""
        return ExpertWeights(
            up=tuple(part.view(block) for part in self.up),
            down=self.down.view(block),
            up_bias=tuple(part.view(block) for part in self.up_bias),
            down_bias=None if self.down_bias is None else self.down_bias.view(block),
        )

    def write(self, weights: ExpertWeights, block: Tensor) -> None:
        """Copy an expert's weights into a block.

        Gate and up may be joined in the layout and apart in `weights`, or the reverse: a shard can end between the
        two. Raises `ValueError`, before a byte is written, for weights of other shapes than the layout's.
        """
        pairs = [*self._pairs(weights.up, self.up, block), *self._pairs((weights.down,), (self.down,), block)]
        down_bias = () if weights.down_bias is None else (weights.down_bias,)
        for tensors, places in ((weights.up_bias, self.up_bias), (down_bias, self._down_bias)):
            pairs.append((tuple(part.view(block) for part in places), tensors))
        for parts, tensors in pairs:
            if _outline(parts) != _outline(tensors):
                raise ValueError(f"weights are {_shapes(tensors)} where the layout has {_shapes(parts)}")
        for parts, tensors in pairs:
            same = _shapes(parts) == _shapes(tensors)
            sources = tensors if same else torch.cat(list(tensors)).split([len(part) for part in parts])
            for part, source in zip(parts, sources, strict=True):
                part.copy_(source)

    @property
    def _down_bias(self) -> tuple[Part, ...]:
        return () if self.down_bias is None else (self.down_bias,)

    def _pairs(self, matrices: Sequence[Matrix], places: Sequence[Place], block: Tensor) -> list[Pair]:
        """Return the tensors of a block that take those of `matrices`, one pair for each kind of part."""
        packed = [matrix for matrix in matrices if isinstance(matrix, Packed)]
        plain = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
        rooms = [place for place in places if isinstance(place, PackedPart)]
        if not packed and not rooms:
            return [(tuple(place.view(block) for place in places if isinstance(place, Part)), tuple(plain))]
        kinds = [*map(_kind, packed), *map(_kind, rooms)]
        if plain or len(rooms) != len(places) or kinds.count(kinds[0]) != len(kinds):
            raise ValueError("an expert is not quantised as the first one of its layer is")
        taken = list(zip(*(map(_bytes, matrix.parts) for matrix in packed), strict=True))
        given = list(zip(*([_bytes(part.view(block)) for part in place.parts] for place in rooms), strict=True))
        factors = torch.tensor([matrix.factor for matrix in packed], dtype=torch.float32)
        if len(packed) != len(rooms):
            if len(set(factors.tolist())) != 1:
                raise ValueError(
                    f"an expert has the factors {factors.tolist()} where the first of its layer has one"
                )
            factors = factors[:1].expand(len(rooms))
        return [*zip(given, taken, strict=True), *_factors(rooms, factors, block)]


def _factors(rooms: Sequence[PackedPart], factors: Tensor, block: Tensor) -> list[Pair]:
    return [((room.factor.view(block),), (factor.view(1),)) for room, factor in zip(rooms, factors, strict=True)]


def _kind(matrix: Packed | PackedPart) -> tuple[object, ...]:
    """Return all that must be the same where matrices share a layout, beside their rows."""
    return matrix.code, matrix.shape[1], matrix.block, [part.dtype for part in matrix.parts]


def _bytes(tensor: Tensor) -> Tensor:
    """Return numbers of 8 bits as bytes: torch joins and copies them, whatever they are."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


class _Room:
    """Places one tensor behind the other."""

    def __init__(self) -> None:
        self.end = 0

    def tensor(self, tensor: Tensor) -> Part:
        part = Part.of(tensor, self.end)
        self.end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return part

    def matrix(self, matrix: Matrix) -> Place:
        if isinstance(matrix, Tensor):
            return self.tensor(matrix)
        parts = tuple(map(self.tensor, matrix.parts))
        factor = self.tensor(torch.empty(1, dtype=torch.float32))
        return PackedPart(parts, matrix.code, matrix.shape, matrix.block, factor)


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _outline(tensors: Sequence[Tensor]) -> tuple[int, set[torch.Size]]:
    """Return the rows in all, and the shape of a row."""
    return sum(len(tensor) for tensor in tensors), {tensor.shape[1:] for tensor in tensors}
