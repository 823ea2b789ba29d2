"""The dense part on the CPU: linear layers multiply with the calibrated kernels, from aligned memory.

Routers multiply by themselves with `F.linear`, so their weights are of a class that uses our kernels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fiddler.devices.kernels import Kernels, linear

ALIGNMENT = 64
"""Bytes of a cache line. Weights that transformers left in the mapped file lie wherever its header ends, and
matmuls with few rows read unaligned ones 10 to 14 % slower."""


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of every linear layer, `[out, in]`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            yield module.weight


def accelerate(model: nn.Module, kernels: Kernels) -> None:
    """Let every 16-bit linear layer use `kernels`, and move unaligned weights into aligned memory."""
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or weight.dtype == torch.float32:
            continue
        if type(module) is nn.Linear:
            module.forward = _Linear(module, kernels)  # type: ignore[method-assign, assignment]
        elif not isinstance(module, nn.Embedding):
            module.weight = _Weight.of(weight)


class _Weight(Tensor):
    """A weight whose module calls `F.linear` itself; the call ends in our kernel."""

    @classmethod
    def of(cls, weight: nn.Parameter) -> Any:
        """Return a parameter with the same memory."""
        parameter: Any = weight.detach().as_subclass(cls)
        parameter._is_param = True  # what `nn.Parameter` goes by
        return parameter

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is not F.linear or kwargs or args[0].dtype != args[1].dtype:
                return func(*args, **(kwargs or {}))
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if x.dim() == 2:
                return linear(x, weight, bias)
            return linear(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], -1)


class _Linear:
    """A linear layer's forward. It runs several times a layer and token, so it looks everything up once."""

    def __init__(self, module: nn.Linear, kernels: Kernels) -> None:
        self._module = module
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        weight, kernels = self._module.weight, self._kernels
        rows, shape = x.reshape(-1, x.shape[-1]), weight.shape
        n_rows = rows.shape[0]
        multiply = kernels.products.get((shape, weight.stride(), weight.dtype, n_rows))
        if multiply is None:
            multiply = kernels.product(weight, n_rows)
        return multiply(rows, weight, self._module.bias).reshape(*x.shape[:-1], shape[0])
