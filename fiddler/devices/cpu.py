"""The CPU: experts run where their weights lie on the host."""

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
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for load in loads:
            out[load.start : load.stop] = self.expert(layer, load, self.weights(layer, load.expert), rows)
        return out

    def expert(self, layer: int, load: Load, weights: ExpertWeights, rows: Tensor) -> Tensor:
        """Return one load's output `[n_rows, H]` with these `weights`, wherever they are."""
        up, down = self.matmuls(layer, load.n_rows)
        return run_expert(self.formulas[layer], weights, rows[load.start : load.stop], up, down)

    def matmuls(self, layer: int, n_rows: int) -> tuple[Matmul, Matmul]:
        """Return the kernels for up and down, looked up once per layer and row count: experts share a shape.

        The layer's first expert decides, as in its blocks: a file may end between one's gate and up.
        """
        found = self._picked.get((layer, n_rows))
        if found is None:
            weights = self.weights(layer, 0)
            found = self.kernels.pick(weights.up[0], n_rows), self.kernels.pick(weights.down, n_rows)
            self._picked[layer, n_rows] = found
        return found
