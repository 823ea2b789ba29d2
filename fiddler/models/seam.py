"""The experts seam: one function, registered with transformers, through which every MoE layer passes.

Inside a `Forward` greenlet it hands an `ExpertsCall` to the forward's driver and is resumed with the result; in any
other code (a plain `model.generate()`) it computes at once. Calls are keyed by module, never by order.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, is_autocast_enabled, is_grad_enabled, is_inference_mode_enabled, nn
from transformers.integrations import moe

from fiddler.devices.formula import ExpertFormula
from fiddler.errors import EngineError
from fiddler.types import ExpertWeights

NAME = "fiddler"
"""The experts implementation's name in transformers' registry."""

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
"""Names of an experts module's parameters, each stacked `[E, …]`."""

FORMULA = ("act_fn", "_apply_gate", "is_transposed", "has_gate", "has_bias")
"""Names of the attributes that define such a module's formula."""

ExpertsModule = Any
"""An experts module of transformers; typed `Any`, for `nn.Module` knows none of the seam's flags."""

Compute = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, hidden [T, H], index [T, K], weights [T, K]) -> [T, H]`."""


class ExpertsCall(NamedTuple):
    """A layer's request for its experts: `hidden` `[T, H]`, `index` and `weights` `[T, K]`."""

    layer: int
    hidden: Tensor
    index: Tensor  # type: ignore[assignment]  # a field, not tuple.index
    weights: Tensor


def experts_function(module: ExpertsModule, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' output `[T, H]`; transformers calls this in place of its own implementations."""
    layer, compute = module._fiddler
    current = getcurrent()
    if isinstance(current, Forward):
        output = current.suspend(ExpertsCall(layer, hidden, index, weights))
    else:
        output = compute(layer, hidden, index, weights)
    return output


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_function)


class Forward(greenlet):  # type: ignore[misc]  # greenlet ships no types for it
    """A model's forward as a coroutine: `send` runs it to its next `ExpertsCall` or to its end.

    It must be driven by one thread. torch's thread-wide modes must be the same after a switch as before it: a
    mode held across a switch would leak into other forwards.
    """

    length: int | None = None
    """Tokens of its longest sequence, prompts counted whole, for embeddings that depend on it: models/rotary.py."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)

    def send(self, output: Tensor | None = None) -> Any:
        """Resume with the experts' output; returns the next `ExpertsCall`, or the result of `run` once `dead`."""
        modes = is_grad_enabled(), is_inference_mode_enabled(), is_autocast_enabled("cpu")
        result = self.switch() if output is None else self.switch(output)
        if isinstance(result, GreenletExit):  # greenlet returns this one where it raises every other
            raise result
        if modes != (is_grad_enabled(), is_inference_mode_enabled(), is_autocast_enabled("cpu")):
            raise EngineError("a torch mode (grad, inference, autocast) was held across a switch of forwards")
        return result

    def suspend(self, call: ExpertsCall) -> Tensor:
        """Hand a call to the driver and wait for its result; runs inside the forward."""
        assert self.parent is not None
        output: Tensor = self.parent.switch(call)
        return output

    def close(self) -> None:
        """Unwind an unfinished forward."""
        if self and not self.dead:
            self.throw()


def find_experts(model: nn.Module) -> dict[str, ExpertsModule]:
    """Return the modules whose experts go through the seam, by path, in the order the model runs them."""
    return {path: module for path, module in model.named_modules() if is_seamed(module)}


def is_seamed(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's experts through its registry."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def bind(experts: Mapping[str, ExpertsModule], compute: Compute) -> None:
    """Give each experts module its layer number and the function that computes it outside a `Forward`."""
    for layer, module in enumerate(experts.values()):
        module._fiddler = (layer, compute)


def formula(module: ExpertsModule, *, halves: bool = False) -> ExpertFormula:
    """Read an experts module's flags into the formula a device computes.

    With `halves` all rows of gate come before those of up, also where they take turns in the module's parameters.
    """
    custom = type(module)._apply_gate is not moe._default_apply_gate
    gate: Callable[[Tensor], Tensor] | None = module._apply_gate if custom and module.has_gate else None
    if halves and gate is not None and not module.is_concatenated:
        gate = _of_halves(gate)
    return ExpertFormula(
        gated=bool(module.has_gate),
        activation=getattr(module, "act_fn", None),
        gate=gate,
        post_norm=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
    )


def _of_halves(gate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a gate for halves by one that wants them to take turns."""
    return lambda halves: gate(torch.stack(halves.chunk(2, dim=-1), dim=-1).flatten(-2))


def module_weights(module: ExpertsModule, expert: int) -> ExpertWeights:
    """Return one expert's weights as views of a loaded module's own parameters."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    matrices = [getattr(module, name)[expert] for name in (up, "down_proj")]
    if module.is_transposed:
        matrices = [matrix.t() for matrix in matrices]
    if not module.has_bias:
        return ExpertWeights((matrices[0],), matrices[1])
    biases = [getattr(module, f"{name}_bias")[expert] for name in (up, "down_proj")]
    return ExpertWeights((matrices[0],), matrices[1], (biases[0],), biases[1])


def own_tensors(module: ExpertsModule) -> tuple[Tensor, ...] | None:
    """Return a loaded module's parameters; `None` where one of them is computed, by an adapter say."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = (up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else ()))
    tensors = tuple(module._parameters.get(name) for name in names)
    return None if any(tensor is None for tensor in tensors) else tensors


def own_forward(module: ExpertsModule) -> Callable[..., Any]:
    """Return the forward that a module's class had before transformers put its registry in front."""
    found: Any = (vars(cls).get("forward") for cls in type(module).__mro__)
    forward: Callable[..., Any] = next(each.__wrapped__ for each in found if hasattr(each, "__wrapped__"))
    return forward
