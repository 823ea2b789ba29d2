"""Recognises the formula between an expert's up and down by trying it: no class or model is known by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.formula import ExpertFormula


class Activation(IntEnum):
    """The activations of our kernels; the numbers are those of gates.h."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    RELU2 = 4
    SIGMOID = 5
    """`x * sigmoid(slope * x)`, rounded three times."""


_PLAIN: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU: F.relu,
    Activation.RELU2: lambda x: F.relu(x).square(),
}


@dataclass(frozen=True, slots=True)
class Gate:
    """A formula that the kernels know: `activation(gate) * (up + shift)`, or `activation(up)`."""

    activation: Activation = Activation.SILU
    gated: bool = True
    interleaved: bool = False
    """Whether rows of gate and up take turns in their joined matrix."""
    limit: float = math.inf
    """What gate is clamped to from above, and up from both sides."""
    limit_after: bool = False
    """Whether the activation is clamped, and not what goes into it."""
    slope: float = 1.0
    """Of `SIGMOID`."""
    shift: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the formula's result, computed by torch and rounded after each operation."""
        if not self.gated:
            return self._active(up)
        gate = (
            self._active(gate).clamp(max=self.limit)
            if self.limit_after
            else self._active(gate.clamp(max=self.limit))
        )
        up = up.clamp(-self.limit, self.limit)
        return gate * (up + self.shift if self.shift else up)

    def _active(self, x: Tensor) -> Tensor:
        plain = _PLAIN.get(self.activation)
        return x * torch.sigmoid(x * self.slope) if plain is None else plain(x)


def recognised(formula: ExpertFormula) -> Gate | None:
    """Return the gate that computes the same as a formula, bit by bit on samples; `None` where there is none."""
    if formula.post_norm is not None:
        return None
    act, joined = formula.activation, formula.gate
    if joined is None:
        if act is None:
            return None
        if not formula.gated:
            return _first((lambda _, up: act(up)), _candidates(act(_one(1.0)).item(), gated=False))
        return _first((lambda gate, up: act(gate) * up), _candidates(act(_one(1.0)).item()))
    for interleaved in (False, True):
        found = _fitted(lambda gate, up: joined(_join(gate, up, interleaved)), interleaved=interleaved)  # noqa: B023
        if found is not None:
            return found
    return None


_Formula = Callable[[Tensor, Tensor], Tensor]
_FAR = 1e6
"""Beyond every limit."""


def _one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float32, device="cpu")


def _join(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    """Return gate and up as one matrix multiplication leaves them."""
    return torch.stack((gate, up), dim=-1).flatten(-2) if interleaved else torch.cat((gate, up), dim=-1)


def _fitted(tried: _Formula, *, interleaved: bool) -> Gate | None:
    """Return the gate whose constants a few values of `tried` give away."""

    def at(gate: float, up: float) -> float:
        return tried(_one(gate), _one(up)).item()

    rise = (at(1.0, 0.5) - at(1.0, 0.0)) / 0.5  # activation(1)
    if not math.isfinite(rise) or rise == 0.0:
        return None
    shift = round(at(1.0, 0.0) / rise, 4)
    far = at(1.0, _FAR) / rise - shift
    limit = round(far, 3) if far < 0.9 * _FAR else math.inf
    candidates = [
        Gate(each.activation, True, interleaved, limit, after, each.slope, shift)
        for each in _candidates(rise)
        for after in (False, True)
    ]
    exact = math.isinf(limit) or _one(limit).bfloat16().item() == limit
    return _first(tried, candidates) if exact else None


def _candidates(at_one: float, *, gated: bool = True) -> list[Gate]:
    """Return every activation, where it is a sigmoid's with the slope that its value at one shows."""
    slope = round(math.log(at_one / (1 - at_one)), 4) if 0 < at_one < 1 else 1.0
    return [Gate(activation, gated, slope=slope) for activation in Activation]


def _first(tried: _Formula, candidates: list[Gate]) -> Gate | None:
    """Return the first candidate that has the results of `tried`, in float32 and in bfloat16."""
    for gate in candidates:
        if all(torch.equal(tried(*sample), gate(*sample)) for sample in _samples()):
            return gate
    return None


def _samples() -> list[tuple[Tensor, Tensor]]:
    wide, near = (torch.linspace(-end, end, 61, dtype=torch.float32, device="cpu") for end in (30.0, 3.0))
    one = torch.cat((wide, near))
    gate, up = one.repeat_interleave(len(one))[None], one.flip(0).repeat(len(one))[None]
    return [(gate, up), (gate.bfloat16(), up.bfloat16())]
