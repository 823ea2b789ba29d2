"""The CPU: every expert runs where its weights lie, in the mapped checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fiddler.devices.base import ExpertFormula
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

    def run(self, layer: int, loads: tuple[Load, ...], rows: Tensor) -> Tensor:
        """Run the loads of a layer on `rows` `[n, H]`, grouped by expert; returns `[n, H]` in the same order."""
        formula = self.formulas[layer]
        out = torch.empty_like(rows)
        for load in loads:
            x = rows[load.start : load.stop]
            out[load.start : load.stop] = run_expert(formula, self.weights(layer, load.expert), x, self.kernels)
        return out
