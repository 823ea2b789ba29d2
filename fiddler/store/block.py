"""How one expert's parts lie in its block: one run of bytes that is copied whole and read through views."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

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
class BlockLayout:
    """The parts of a block, as `ExpertWeights` has them; experts of one layer share a layout."""

    up: tuple[Part, ...]
    down: Part
    up_bias: tuple[Part, ...]
    down_bias: Part | None
    nbytes: int
    """Size of a block, a multiple of `ALIGNMENT`."""

    @classmethod
    def of(cls, sample: ExpertWeights) -> "BlockLayout":
        """Return the layout for experts of the shapes, dtypes and memory order of `sample`."""
        end = 0

        def place(tensor: Tensor) -> Part:
            nonlocal end
            part = Part.of(tensor, end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            return part

        up, down = tuple(map(place, sample.up)), place(sample.down)
        up_bias = tuple(map(place, sample.up_bias))
        down_bias = None if sample.down_bias is None else place(sample.down_bias)
        return cls(up, down, up_bias, down_bias, end)

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
        pairs = list(zip(_groups(self.views(block)), _groups(weights), strict=True))
        for parts, tensors in pairs:
            if _outline(parts) != _outline(tensors):
                raise ValueError(f"weights are {_shapes(tensors)} where the layout has {_shapes(parts)}")
        for parts, tensors in pairs:
            same = _shapes(parts) == _shapes(tensors)
            sources = tensors if same else torch.cat(list(tensors)).split([len(part) for part in parts])
            for part, source in zip(parts, sources, strict=True):
                part.copy_(source)


def _groups(weights: ExpertWeights) -> tuple[tuple[Tensor, ...], ...]:
    down_bias = () if weights.down_bias is None else (weights.down_bias,)
    return weights.up, (weights.down,), weights.up_bias, down_bias


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _outline(tensors: Sequence[Tensor]) -> tuple[int, set[torch.Size]]:
    """Rows in all, and what each row looks like."""
    return sum(len(tensor) for tensor in tensors), {tensor.shape[1:] for tensor in tensors}
