"""The CPU: runs experts on the host, in place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fiddler.devices.formula import ExpertFormula, Matmul, run_expert
from fiddler.devices.gates import Gate, recognised
from fiddler.devices.kernels import Kernels
from fiddler.devices.native import learns
from fiddler.devices.outline import Outline, fits
from fiddler.formats.packed import tensors
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

MOST_OUTLINES = 1 << 16
"""Number of experts whose memory layout is remembered; all are forgotten when there are more."""


class _Way(NamedTuple):
    """The way in which a layer's experts run at some row count."""

    up: Matmul
    down: Matmul
    together: bool
    """Whether our own kernels run them all at once, or one runs after the other."""


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """Runs experts of any layer on rows; the threads share each expert, or all of them at once.

    Results of an expert depend on the expert and its number of rows, not on the loads that run beside it.
    """

    weights: Callable[[int, int], ExpertWeights]
    """(layer, expert) to its weights."""
    formulas: tuple[ExpertFormula, ...]
    """Formulas by layer."""
    kernels: Kernels
    _experts: dict[tuple[int, int], ExpertWeights] = field(default_factory=dict)
    _ways: dict[tuple[int, int], _Way] = field(default_factory=dict)
    """By layer and row count."""
    _gates: dict[int, Gate | None] = field(default_factory=dict)
    _outlines: dict[int, tuple[ExpertWeights, Outline | None]] = field(default_factory=dict)

    def experts(self, layer: int, loads: Sequence[Load]) -> list[ExpertWeights]:
        """Return the weights that loads of a layer are run with on the host, each asked for once."""
        known, found = self._experts, []
        for load in loads:
            key = layer, load.expert
            own = known.get(key)
            if own is None:
                own = known[key] = self.weights(*key)
            found.append(own)
        return found

    def run(
        self, layer: int, loads: Sequence[Load], weights: Sequence[ExpertWeights], rows: Tensor, out: Tensor
    ) -> None:
        """Run loads of a layer with these `weights`, wherever they are.

        `rows` and `out` are `[n, H]`, grouped by expert; `out` has no gaps and is written where the loads are.
        """
        by_torch = rows.dtype != torch.bfloat16 or (
            torch.is_grad_enabled() and learns(rows, *(part for own in weights for part in tensors(own.down)))
        )
        ways, known = self._ways, self._outlines
        together, outlines, apart = [], [], []
        for load, own in zip(loads, weights, strict=True):
            way, outline = ways.get((layer, load.n_rows)) or self._way(layer, load.n_rows), None
            if way.together and not by_torch:
                outline = (known.get(id(own)) or self._look(layer, own))[1]
            if outline is None:
                apart.append((load, own, way))
            else:
                together.append(load)
                outlines.append(outline)
        if together:
            assert self.kernels.native is not None
            self.kernels.native.experts(together, outlines, rows, out)
        for load, own, way in apart:
            mine = slice(load.start, load.stop)
            out[mine] = run_expert(self.formulas[layer], own, rows[mine], way.up, way.down)

    def _look(self, layer: int, weights: ExpertWeights) -> tuple[ExpertWeights, Outline | None]:
        """Return an expert's memory layout, or `None` for one that our kernels do not take.

        The expert is kept alive, so that no other takes its id.
        """
        if len(self._outlines) >= MOST_OUTLINES:
            self._outlines.clear()
        gate = self._gates[layer]
        assert gate is not None
        try:
            outline = Outline.of(weights, gate)
        except ValueError:
            outline = None
        found = self._outlines[id(weights)] = weights, outline
        return found

    def _way(self, layer: int, n_rows: int) -> _Way:
        """Look up once per layer and row count: experts share a shape, and codes where they have any.

        The layer's first expert decides, as in its blocks: a file may end between one's gate and up.
        """
        if layer not in self._gates:
            self._gates[layer] = recognised(self.formulas[layer])
        weights, kernels = self.weights(layer, 0), self.kernels
        taken = all(kernels.is_ours(matrix, n_rows) and fits(matrix) for matrix in weights.matrices)
        up, down = (kernels.pick(matrix, n_rows) for matrix in (weights.up[0], weights.down))
        found = self._ways[layer, n_rows] = _Way(up, down, taken and self._gates[layer] is not None)
        return found


def empty_results(rows: Tensor) -> Tensor:
    """Return room for the results of `rows` `[n, H]`, without gaps."""
    return torch.empty_like(rows, memory_format=torch.contiguous_format)
