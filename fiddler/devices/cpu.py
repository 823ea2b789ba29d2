"""The CPU: experts run where their weights lie on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fiddler.devices.formula import ExpertFormula, Matmul, run_expert
from fiddler.devices.kernels import Kernels
from fiddler.devices.native import Outline, fits, takes
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

MOST_OUTLINES = 1 << 16
"""Experts of which it is remembered how they lie; all are forgotten when there are more."""


class _Way(NamedTuple):
    """How a layer's experts run at some row count."""

    up: Matmul
    down: Matmul
    together: bool
    """Whether our own kernels run them all at once, or one runs after the other."""


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """Runs experts of any layer on rows; the threads share each expert, or all of them at once.

    What an expert's rows come to depends on the expert and their number, not on what runs beside it.
    """

    weights: Callable[[int, int], ExpertWeights]
    """(layer, expert) to its weights."""
    formulas: tuple[ExpertFormula, ...]
    """By layer."""
    kernels: Kernels
    _ways: dict[tuple[int, int], _Way] = field(default_factory=dict)
    _outlines: dict[int, tuple[ExpertWeights, Outline]] = field(default_factory=dict)

    def run(
        self, layer: int, loads: Sequence[Load], weights: Sequence[ExpertWeights], rows: Tensor, out: Tensor
    ) -> None:
        """Run loads of a layer with these `weights`, wherever they are.

        `rows` and `out` are `[n, H]`, grouped by expert; `out` has no gaps and is written where the loads are.
        """
        ways = [self._way(layer, load.n_rows) for load in loads]
        together = [i for i, way in enumerate(ways) if way.together]
        if together and takes(rows, weights):
            assert self.kernels.native is not None
            outlines = [self._outline(weights[i]) for i in together]
            self.kernels.native.experts([loads[i] for i in together], outlines, rows, out)
        else:
            together = []
        for i in sorted(set(range(len(loads))) - set(together)):
            mine = slice(loads[i].start, loads[i].stop)
            out[mine] = run_expert(self.formulas[layer], weights[i], rows[mine], ways[i].up, ways[i].down)

    def _outline(self, weights: ExpertWeights) -> Outline:
        """Look at an expert once; it is kept alive, so that its id stays its own."""
        known = self._outlines.get(id(weights))
        if known is None:
            if len(self._outlines) >= MOST_OUTLINES:
                self._outlines.clear()
            known = self._outlines[id(weights)] = weights, Outline.of(weights)
        return known[1]

    def _way(self, layer: int, n_rows: int) -> _Way:
        """Look up once per layer and row count: experts share a shape.

        The layer's first expert decides, as in its blocks: a file may end between one's gate and up.
        """
        found = self._ways.get((layer, n_rows))
        if found is None:
            found = self._ways[layer, n_rows] = self._choose(layer, n_rows)
        return found

    def _choose(self, layer: int, n_rows: int) -> _Way:
        weights, kernels = self.weights(layer, 0), self.kernels
        matrices = (*weights.up, weights.down)
        whole = (
            all(kernels.name(matrix, n_rows) == "native" and fits(matrix) for matrix in matrices)
            and self.formulas[layer].is_swiglu
            and not weights.up_bias
            and weights.down_bias is None
        )
        up, down = (kernels.pick(matrix, n_rows) for matrix in (weights.up[0], weights.down))
        return _Way(up, down, whole)


def empty_results(rows: Tensor) -> Tensor:
    """Return room for the results of `rows` `[n, H]`, without gaps."""
    return torch.empty_like(rows, memory_format=torch.contiguous_format)
