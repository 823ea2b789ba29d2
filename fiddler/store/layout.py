"""Where the parts of every expert lie: checkpoint tensor names and the views into them. No tensor is touched."""

from dataclasses import dataclass
from typing import Literal

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
    """One expert's parts, in the order `devices.base.ExpertWeights` describes."""

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
