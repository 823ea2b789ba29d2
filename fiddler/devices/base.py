"""What a device is asked for, and the values it works on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class ExpertFormula:
    """What varies between experts classes beside their weights.

    Exactly one of `activation` and `gate` decides: `gate` maps the joined up output `[n, 2I]` (or `[n, I]`) to
    `[n, I]`; where it is `None` the standard `activation(gate) * up` (or `activation(up)` if not `gated`) applies.
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


Matmul = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`(x [n, in], weight [out, in], bias [out] | None) -> [n, out]`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
