"""The dense part on the CPU: linear layers multiply with the calibrated kernels, from aligned memory."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fiddler.devices.kernels import Kernels

ALIGNMENT = 64
"""Bytes of a cache line. Weights that transformers left in the mapped file lie wherever its header ends, and
matmuls with few rows read unaligned ones 10 to 14 % slower."""


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of every linear layer, `[out, in]`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            yield module.weight


def accelerate(model: nn.Module, kernels: Kernels) -> None:
    """Let every linear layer use `kernels`, and move what is not aligned into memory that is."""
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
    if not kernels.choice:
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.forward = _Linear(module, kernels)  # type: ignore[method-assign, assignment]


class _Linear:
    """A linear layer's forward."""

    def __init__(self, module: nn.Linear, kernels: Kernels) -> None:
        self._module = module
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._module.weight
        rows = x.reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        y = self._kernels.pick(weight, rows.shape[0])(rows, weight, self._module.bias)
        return y.reshape(*x.shape[:-1], -1)
