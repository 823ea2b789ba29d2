"""The CPU: every expert runs where its weights lie, in the mapped checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fiddler.devices.base import ExpertFormula, Matmul
from fiddler.devices.kernels import Kernels
from fiddler.devices.mlp import run_expert
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """Runs experts of any layer on rows, one after the other; torch spreads each over the threads."""

    weights: Callable[[int, int], ExpertWeights]
    """(layer, expert) to its weights."""
    formulas: tuple[ExpertFormula, ...]
    """By layer."""
    kernels: Kernels
    _picked: dict[tuple[int, int], tuple[Matmul, Matmul]] = field(default_factory=dict)

    def run(self, layer: int, loads: tuple[Load, ...], rows: Tensor) -> Tensor:
        """Run the loads of a layer on `rows` `[n, H]`, grouped by expert; returns `[n, H]` in the same order."""
        formula = self.formulas[layer]
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for load in loads:
            weights = self.weights(layer, load.expert)
            up, down = self.matmuls(layer, load.n_rows, weights)
            x = rows[load.start : load.stop]
            out[load.start : load.stop] = run_expert(formula, weights, x, up, down)
        return out

    def matmuls(self, layer: int, n_rows: int, weights: ExpertWeights) -> tuple[Matmul, Matmul]:
        """Return the kernels for up and down, looked up once per layer and row count: experts share a shape."""
        found = self._picked.get((layer, n_rows))
        if found is None:
            found = self.kernels.pick(weights.up[0], n_rows), self.kernels.pick(weights.down, n_rows)
            self._picked[layer, n_rows] = found
        return found
