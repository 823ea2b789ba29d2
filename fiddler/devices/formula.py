"""The formula of an expert: up, gate, down, as matmuls and an activation on rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class ExpertFormula:
    """The parts of an experts class that differ between architectures, beside the weights.

    Exactly one of `activation` and `gate` decides: `gate` maps the joined up output `[n, 2I]` (or `[n, I]`) to `[n,
    I]`; where it is `None` the standard `activation(gate) * up` (or `activation(up)` if not `gated`) applies.
    """

    gated: bool
    activation: Callable[[Tensor], Tensor] | None
    gate: Callable[[Tensor], Tensor] | None = None
    post_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def is_swiglu(self) -> bool:
        """Whether it is `silu(gate) * up` and no more. The activation is tried: its class may be anybody's."""
        if not self.gated or self.gate is not None or self.post_norm is not None or self.activation is None:
            return False
        sample = torch.linspace(-99.0, 99.0, 256, dtype=torch.float32, device="cpu")
        return torch.equal(self.activation(sample), F.silu(sample))


Matmul = Callable[[Tensor, Any, Tensor | None], Tensor]
"""`(x [n, in], weight [out, in], bias [out] | None) -> [n, out]`, of a weight like the one it was picked for."""


class Parts(Protocol):
    """The parts of `ExpertWeights`, with weights of any kind that the matmuls take."""

    @property
    def up(self) -> Sequence[Any]:
        """One fused or ungated weight, or gate and up."""
        ...

    @property
    def down(self) -> Any:
        """The weight that leads back."""
        ...

    @property
    def up_bias(self) -> Sequence[Tensor]:
        """Matching `up`, or empty."""
        ...

    @property
    def down_bias(self) -> Tensor | None:
        """Matching `down`."""
        ...


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_expert(formula: ExpertFormula, weights: Parts, x: Tensor, up: Matmul, down: Matmul) -> Tensor:
    """Return the expert's output `[n, H]` for rows `x` `[n, H]`, before the routing weight.

    `up` and `down` are the matmuls for the two kinds of matrices.
    """
    biases: Sequence[Tensor | None] = weights.up_bias or (None,) * len(weights.up)
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
