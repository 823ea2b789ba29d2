"""Run forwards whose tensors lie on a device that is not the CPU: shapes alone, but a mix of the two is an error.

    python -m tests.support.elsewhere mixtral gpt_oss …

A process of its own, for torch takes one such device in its life. Attention, keys and values, recorded steps and
what a layer's rows become are all passed; prints the architectures that went through.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fiddler.gpu.crossing import blank_visits, noted
from fiddler.lanes.experts import Ask, summed
from fiddler.models import attention, seam
from fiddler.models.attention import CapturedCache, StaticInputs
from fiddler.models.kv import Directness, KvArena, SequenceKV, WaveCache
from fiddler.steps.graphs import grouped
from tests.architectures import build
from tests.architectures.config import EXPERTS

ELSEWHERE = "elsewhere"


def main() -> None:
    _setup_privateuseone_for_python_backend(ELSEWHERE)
    for name in sys.argv[1:]:
        model: Any = build(name)
        model.set_attn_implementation(attention.NAME)
        model.set_experts_implementation(seam.NAME)
        seam.bind(seam.find_experts(model), lambda *_: torch.empty(0))
        with FakeTensorMode(), torch.no_grad():
            move(model)
            walk(model)
        print(name)


def numbers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=ELSEWHERE)


def move(model: nn.Module) -> None:
    """Put tensors of the same shapes elsewhere in the place of a model's own."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor):
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=ELSEWHERE)
                    tensors[name] = nn.Parameter(there, requires_grad=False) if is_parameter(tensor) else there


def is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def walk(model: nn.Module) -> None:
    """Two sequences: their prompts in one step, a decoding step, and the same as a graph records it."""
    arena = KvArena(64)
    runs = [arena.reserve(20), arena.reserve(20)]
    pasts, directness = [SequenceKV(run) for run in runs], Directness()
    step(model, WaveCache(pasts, [5, 3], directness, 0), 8)
    step(model, WaveCache(pasts, [1, 1], directness, 5), 2)
    whole = not all(directness.known_direct(layer) for layer in range(2))
    step(model, CapturedCache(arena, StaticInputs(numbers(4, 2)), 16, whole=whole), 2)


def step(model: nn.Module, cache: Any, n_rows: int) -> None:
    def run() -> Tensor:
        output = model(
            input_ids=numbers(1, n_rows), position_ids=numbers(1, n_rows), past_key_values=cache, use_cache=True
        )
        logits: Tensor = output.logits
        return logits

    forward, output = seam.Forward(run), None
    forward.wave = cache
    while True:
        call = forward.send(output)
        if forward.dead:
            assert call.device.type == ELSEWHERE
            return
        ask = Ask(*call, None)
        visits = grouped(ask.index, ask.weights, numbers(EXPERTS).int())
        made = (noted(ask), visits.slots, visits.bounds, visits.positions)
        assert all(tensor.device.type == ELSEWHERE for tensor in made)
        output = summed(blank_visits(ask), ask.weights)


if __name__ == "__main__":
    main()
