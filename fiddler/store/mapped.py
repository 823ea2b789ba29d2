"""The experts' weights as views of the mapped checkpoint files.

`ExpertParts` names the tensors of each expert's parts and the `View` steps that lead into them. `MappedStore` makes
the views, when an expert is first used. Quantised matrices stay packed, whatever the dtype that is computed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.errors import CheckpointError, UnsupportedModelError
from fiddler.formats.packed import Matrix, Packed
from fiddler.formats.quantised import Quantised
from fiddler.store.checkpoint import EXPERT_DTYPES, EXPERT_NAMES, Checkpoint
from fiddler.store.layout import BlockLayout
from fiddler.store.slabs import Slabs
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
    at an odd byte of the file are copied too. So are unaligned float32 ones where this machine's products depend on
    alignment (`aligned`), and experts quantised in codes that lie in another order than `Packed` has them: whole,
    into memory of their own.
    """

    checkpoint: Checkpoint
    layout: Layout
    dtype: torch.dtype
    _experts: dict[tuple[int, int], ExpertWeights] = field(default_factory=dict)
    _slabs: Slabs = field(default_factory=Slabs)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Return an expert's weights. Raises `CheckpointError` where a tensor is missing or cannot be viewed."""
        key = (layer, expert)
        weights = self._experts.get(key)
        if weights is None:
            parts = self.layout.experts[layer][expert]
            made = self._assemble(parts)
            weights = self._experts[key] = self._kept(made) if self._is_repacked(parts) else made
        return weights

    def _is_repacked(self, parts: ExpertParts) -> bool:
        entries = (self.checkpoint.entries[view.tensor] for view in (*parts.up, parts.down))
        return any(isinstance(entry, Quantised) and entry.copied for entry in entries)

    def _kept(self, made: ExpertWeights) -> ExpertWeights:
        """Return weights in memory that has nothing but such."""
        layout = BlockLayout.of(made)
        block = self._slabs.block(layout.nbytes)
        layout.write(made, block)
        return layout.views(block)

    def _assemble(self, parts: ExpertParts) -> ExpertWeights:
        up = self._joined(parts.up) or tuple(matrix for view in parts.up for matrix in self._matrices(view))
        if len(up) > 2:
            raise CheckpointError(
                f"tensor {parts.up[0].tensor!r} has {len(up)} factors for an expert, and gate and up have one each"
            )
        down = self._matrices(parts.down)
        if len(down) != 1:
            raise CheckpointError(f"tensor {parts.down.tensor!r} has {len(down)} factors where an expert has one")
        return ExpertWeights(
            up=up,
            down=down[0],
            up_bias=self._bias(parts.up_bias, n=len(up)),
            down_bias=self._part(parts.down_bias) if parts.down_bias is not None else None,
        )

    def _joined(self, views: tuple[View, ...]) -> tuple[Matrix] | None:
        """Gate and up as one matrix where they lie back to back: one multiplication instead of two."""
        if len(views) != 2 or any(v.steps for v in views):
            return None
        first, second = views[0].tensor, views[1].tensor
        quantised = [isinstance(self.checkpoint.entries.get(name), Quantised) for name in (first, second)]
        if any(quantised):
            return self._joined_packed(first, second) if all(quantised) else None
        tensor = self.checkpoint.joined(first, second)
        return None if tensor is None else (aligned(tensor.to(self.dtype)),)

    def _joined_packed(self, first: str, second: str) -> tuple[Matrix] | None:
        entry = self.checkpoint.entries[first]
        assert isinstance(entry, Quantised)
        if entry.scaled or entry.copied:  # one expert's factors may be equal where another's are not
            return None
        gate, up = self.checkpoint.matrices(first)[0], self.checkpoint.matrices(second)[0]
        joined = gate.beside(up)
        return None if joined is None else (joined,)

    def _matrices(self, view: View) -> tuple[Matrix, ...]:
        entry = self.checkpoint.entries.get(view.tensor)
        return self._packed(view, entry) if isinstance(entry, Quantised) else (self._part(view),)

    def _packed(self, view: View, entry: Quantised) -> tuple[Packed, ...]:
        match view.steps:
            case (Select(index), *steps) if len(entry.shape) == 3:
                matrices = self.checkpoint.matrices(view.tensor, index)
            case steps:
                matrices = self.checkpoint.matrices(view.tensor)
        rows = rows_of(entry, steps)
        if rows is None:
            raise UnsupportedModelError(f"{unviewable(view.tensor, entry)}")
        try:
            for start in rows:
                matrices = tuple(matrix.rows(start, 2) for matrix in matrices)
        except ValueError as error:
            raise UnsupportedModelError(f"tensor {view.tensor!r}: {error}") from error
        return matrices

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
                tensor = self.checkpoint.stored(view.tensor, index)
            case steps:
                tensor = self.checkpoint.stored(view.tensor)
        if (name := self.checkpoint.headers[view.tensor].dtype) not in EXPERT_DTYPES:
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


def rows_of(entry: Quantised, steps: Sequence[Step]) -> list[int] | None:
    """Return which halves of a quantised matrix's rows the steps take, in order, after its expert is selected.

    `None` where they lead to its transpose or take columns apart, of which two may share a byte.
    """
    turned, starts = entry.turned, list[int]()
    for step in steps:
        match step:
            case Transpose():
                turned = not turned
            case Every(axis, start) if axis == int(turned):
                starts.append(start)
            case _:
                return None
    return None if turned or (starts and entry.block[0] != 1) else starts


def unviewable(name: str, entry: Quantised) -> str:
    """Return the complaint about steps that cannot be taken."""
    return (
        f"tensor {name!r} is {entry.dtype}, in another order than the formula of this architecture needs; use the "
        "bf16 version of the model"
    )


def _apply(tensor: Tensor, step: Step) -> Tensor:
    match step:
        case Select(index):
            return tensor[index]
        case Transpose():
            return tensor.t()
        case Every(axis, start):
            return tensor[start::2] if axis == 0 else tensor[:, start::2]
