"""All that is asked of `bench.synthetic`: models of random weights in memory, routing replayed.

One model is kept at a time, for one engine after the other. Its blocks stay locked into RAM meanwhile: to lock them
for every engine again would take longer than what is measured.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bench.synthetic.memory import in_memory
from bench.synthetic.replayed import Replay, drawn, recorded
from bench.synthetic.shapes import SHAPES, Shape, shape
from fiddler.config import EngineConfig
from fiddler.engine.engine import Loader
from fiddler.gpu.device import Gpu
from fiddler.lab.shape import ModelShape
from fiddler.models.loaded import ServableModel
from fiddler.recording import RoutingTrace
from fiddler.store.blocks import BlockStore

N_SEQUENCES, N_TOKENS = 32, 256
"""Of the routing that is replayed, over and over."""
NAMES = tuple(SHAPES)


def sizes_of(spec: str) -> ModelShape:
    """Return a model's sizes. Raises `ValueError` for one that there is not."""
    return shape(spec).sizes


def vocabulary(spec: str) -> int:
    """Return how many tokens a model knows."""
    return int(shape(spec).config["vocab_size"])


class Shelf:
    """Keeps the model that was made last."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._kept: tuple[str, bool, ServableModel] | None = None

    def loader(self, spec: str, *, replayed: bool = True) -> Loader:
        """Return what opens a model again and again; `replayed`: its routers' choice is a recording's.

        Opening raises `ConfigError` where memory is too small. Engines must not be open at the same time.
        """
        return lambda options: self._load(spec, options, replayed=replayed)

    def loaded(self) -> ServableModel:
        """Return the model that is kept."""
        assert self._kept is not None
        return self._kept[2]

    def drop(self) -> None:
        """Let go of the model and of what it has locked."""
        if self._kept is not None:
            store, self._kept = self._kept[2].store, None
            assert isinstance(store, BlockStore)
            BlockStore.unpin(store, self._gpu.unpin)
        self.tidy()

    def tidy(self) -> None:
        """Give back the memory of engines that are closed: their parts refer to each other."""
        gc.collect()
        self._gpu.reclaim()

    def _load(self, spec: str, options: EngineConfig, *, replayed: bool) -> ServableModel:
        kept = self._kept
        if kept is None or kept[:2] != (spec, replayed):
            self.drop()
            of = shape(spec)
            loaded = in_memory(of, options, routing=_routing(of) if replayed else None)
            store: Any = loaded.store
            store.unpin = _stay_locked
            kept = self._kept = spec, replayed, loaded
        self._rewind(kept[2].model)
        return kept[2]

    def _rewind(self, model: Any) -> None:
        """Have a model as it was made: in host memory, its sequences numbered from 0."""
        model.to("cpu")
        replay = getattr(model, "replayed_routing", None)
        if isinstance(replay, Replay):
            replay.restart()


def _stay_locked(unpin: Callable[[torch.Tensor], None]) -> None:
    """In place of `BlockStore.unpin`, until the model goes."""


def _routing(of: Shape) -> RoutingTrace:
    if of.name.partition(":")[0] == "tiny":
        return recorded()
    return drawn(of, N_SEQUENCES, N_TOKENS)


def as_transformers(loaded: ServableModel, spec: str, device: torch.device) -> nn.Module:
    """Return transformers' own model with a loaded model's weights, on a device.

    For architectures whose gate and up are one matrix that is not transposed, as Qwen3's. Raises `ValueError` for
    others.
    """
    config = shape(spec).pretrained()
    dtype = next(loaded.model.parameters()).dtype
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    ours = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for path, tensor in model.named_parameters():
            if path in ours:
                tensor.copy_(ours[path])
        for layer, path in enumerate(loaded.experts):
            _fill(model.get_submodule(path), loaded, layer)
    found: nn.Module = model
    return found


def _fill(module: Any, loaded: ServableModel, layer: int) -> None:
    if module.is_transposed or module.has_bias or not module.has_gate:
        raise ValueError(f"{type(module).__name__}: its experts lie otherwise")
    for expert in range(loaded.n_experts[layer]):
        weights = loaded.weights(layer, expert)
        module.gate_up_proj[expert].copy_(weights.up[0] if len(weights.up) == 1 else torch.cat(weights.up))
        module.down_proj[expert].copy_(weights.down)
