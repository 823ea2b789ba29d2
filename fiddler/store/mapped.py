"""The experts' weights as views of the mapped checkpoint files.

`ExpertParts` names the tensors of each expert's parts and the `View` steps that lead into them. `MappedStore` makes
the views, when an expert is first used.
"""

from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.errors import CheckpointError
from fiddler.store.checkpoint import EXPERT_DTYPES, EXPERT_NAMES, Checkpoint
from fiddler.types import ExpertWeights

Axis = Literal[0, 1]


@dataclass(frozen=True, slots=True)
class Select:
    """One expert of a fused tensor: index the leading dimension."""

    index: int


@dataclass(frozen=True, slots=True)
class Transpose:
    """Swap the two dimensions of a matrix."""


@dataclass(frozen=True, slots=True)
class Every:
    """Each second row or column, from `start`: one half of an interleaved matrix."""

    axis: Axis
    start: Literal[0, 1]


Step = Select | Transpose | Every


@dataclass(frozen=True, slots=True)
class View:
    """A part of a checkpoint tensor, reached by steps that never copy."""

    tensor: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """One expert's parts, in the order of `types.ExpertWeights`."""

    up: tuple[View, ...]
    down: View
    up_bias: tuple[View, ...] = ()
    down_bias: View | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of every expert, by layer and expert."""

    experts: tuple[tuple[ExpertParts, ...], ...]

    @property
    def n_experts(self) -> tuple[int, ...]:
        """Experts per layer."""
        return tuple(len(layer) for layer in self.experts)


BOUNDARY = 16
"""Bytes of the alignment that float32 matrices need."""


@dataclass(frozen=True, slots=True)
class MappedStore:
    """Every expert's weights by (layer, expert); views are made when first asked for and kept.

    `dtype` other than the checkpoint's converts an expert once, when first asked for, and keeps the copy. Matrices
    at an odd byte of the file are copied too, and so are unaligned float32 ones where this machine's products
    depend on alignment (`aligned`).
    """

    checkpoint: Checkpoint
    layout: Layout
    dtype: torch.dtype
    _experts: dict[tuple[int, int], ExpertWeights] = field(default_factory=dict)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Return an expert's weights. Raises `CheckpointError` where a tensor is missing or cannot be viewed."""
        key = (layer, expert)
        weights = self._experts.get(key)
        if weights is None:
            weights = self._experts[key] = self._assemble(self.layout.experts[layer][expert])
        return weights

    def _assemble(self, parts: ExpertParts) -> ExpertWeights:
        up = self._joined(parts.up)
        return ExpertWeights(
            up=up if up is not None else tuple(self._part(v) for v in parts.up),
            down=self._part(parts.down),
            up_bias=self._bias(parts.up_bias, n=len(parts.up) if up is None else 1),
            down_bias=self._part(parts.down_bias) if parts.down_bias is not None else None,
        )

    def _joined(self, views: tuple[View, ...]) -> tuple[Tensor] | None:
        """Gate and up as one matrix where they lie back to back: one multiplication instead of two."""
        if len(views) != 2 or any(v.steps for v in views):
            return None
        tensor = self.checkpoint.joined(views[0].tensor, views[1].tensor)
        return None if tensor is None else (aligned(tensor.to(self.dtype)),)

    def _bias(self, views: tuple[View, ...], n: int) -> tuple[Tensor, ...]:
        biases = tuple(self._part(v) for v in views)
        if len(biases) in (0, n):
            return biases
        return (torch.cat(biases),) if n == 1 else biases[0].chunk(n)

    def _part(self, view: View) -> Tensor:
        return aligned(self._view(view).to(self.dtype))

    def _view(self, view: View) -> Tensor:
        match view.steps:
            case (Select(index), *steps):  # first: what has to be copied is one expert then, not all
                tensor = self.checkpoint.tensor(view.tensor, index)
            case steps:
                tensor = self.checkpoint.tensor(view.tensor)
        if (name := self.checkpoint.entries[view.tensor].dtype) not in EXPERT_DTYPES:
            raise CheckpointError(f"tensor {view.tensor!r} is {name}; experts must be {EXPERT_NAMES}")
        for step in steps:
            tensor = _apply(tensor, step)
        return tensor

    def check(self) -> None:
        """Raise `CheckpointError` if a file with experts was changed: results may be wrong."""
        self.checkpoint.check()


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor whose products are those of a packed block: itself, or a copy on a boundary.

    MKL takes another path for float32 off a boundary of 16 bytes on processors that are not Intel's, and other bits
    come out. Tensors with gaps are copied anyway before they are multiplied.
    """
    off = tensor.dtype == torch.float32 and tensor.data_ptr() % BOUNDARY
    dense = tensor.is_contiguous() or tensor.t().is_contiguous()
    return tensor.clone() if off and dense and _bits_hang_on_alignment() else tensor


@lru_cache
def _bits_hang_on_alignment() -> bool:
    """Try whether bits depend on alignment: one product, with the matrix on a boundary and one float off it."""
    n = 64
    with torch.inference_mode(False):
        line = partial(torch.linspace, dtype=torch.float32, device="cpu")
        weight, x = line(-1.0, 1.0, n * n).sin().view(n, n), line(0.0, 2.0, n).cos()[None]
        room = torch.empty(n * n + 1, dtype=torch.float32, device="cpu")
        off = room[1:].view(n, n).copy_(weight)
        return any(not torch.equal(F.linear(rows, weight), F.linear(rows, off)) for rows in (x, x.repeat(3, 1)))


def _apply(tensor: Tensor, step: Step) -> Tensor:
    match step:
        case Select(index):
            return tensor[index]
        case Transpose():
            return tensor.t()
        case Every(axis, start):
            return tensor[start::2] if axis == 0 else tensor[:, start::2]
