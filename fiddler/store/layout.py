"""Where the parts of every expert lie: checkpoint tensor names and the views into them. No tensor is touched."""

from dataclasses import dataclass
from typing import Literal


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

    axis: Literal[0, 1]
    start: Literal[0, 1]


@dataclass(frozen=True, slots=True)
class Piece:
    """The `index`-th of `n` equal pieces along `axis`."""

    axis: Literal[0, 1]
    index: int
    n: int


Step = Select | Transpose | Every | Piece


@dataclass(frozen=True, slots=True)
class View:
    """A part of a checkpoint tensor, reached by steps that never copy."""

    tensor: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """One expert's parts, in the order `devices.base.ExpertWeights` describes."""

    up: tuple[View, ...]
    down: View
    up_bias: tuple[View, ...] = ()
    down_bias: View | None = None

    def views(self) -> tuple[View, ...]:
        """Return every part, in the order it is read."""
        return (*self.up, *self.up_bias, self.down, *((self.down_bias,) if self.down_bias else ()))


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of every expert, by layer and expert."""

    experts: tuple[tuple[ExpertParts, ...], ...]

    @property
    def n_experts(self) -> tuple[int, ...]:
        """Experts per layer."""
        return tuple(len(layer) for layer in self.experts)
