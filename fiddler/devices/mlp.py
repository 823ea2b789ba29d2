"""The formula of one expert on some rows: up, gate, down."""

import torch
from torch import Tensor

from fiddler.devices.base import ExpertFormula, Matmul
from fiddler.types import ExpertWeights


def run_expert(formula: ExpertFormula, weights: ExpertWeights, x: Tensor, up: Matmul, down: Matmul) -> Tensor:
    """Return the expert's output `[n, H]` for rows `x` `[n, H]`, before the routing weight.

    `up` and `down` are the matmuls for the two kinds of matrices.
    """
    biases: tuple[Tensor | None, ...] = weights.up_bias or (None,) * len(weights.up)
    ups = [up(x, w, b) for w, b in zip(weights.up, biases, strict=True)]
    y = down(gated(formula, ups), weights.down, weights.down_bias)
    return y if formula.post_norm is None else formula.post_norm(y)


def gated(formula: ExpertFormula, ups: list[Tensor]) -> Tensor:
    """Turn the up outputs, `[n, I]` or `[n, 2I]` each, into the down input `[n, I]`."""
    if formula.gate is not None:
        return formula.gate(ups[0] if len(ups) == 1 else torch.cat(ups, dim=-1))
    assert formula.activation is not None
    if not formula.gated:
        return formula.activation(ups[0])
    gate, up = ups if len(ups) == 2 else ups[0].chunk(2, dim=-1)
    return formula.activation(gate) * up
