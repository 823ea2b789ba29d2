"""A checkpoint opened for its experts alone, to measure them: no dense weight is read, and few experts are."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fiddler.config import EngineConfig, resolve
from fiddler.devices.arena import Arena
from fiddler.devices.base import DTYPES
from fiddler.devices.calibrate import calibrated_kernels
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.measure import SAMPLE_BYTES, Bench
from fiddler.devices.sim import SimDevice
from fiddler.engine.setup import choose_threads
from fiddler.models import seam
from fiddler.models.loaded import LoadedModel, checkpoint_dtype, find_checkpoint, model_context
from fiddler.models.naming import expert_layout
from fiddler.models.skeleton import meta_skeleton, read_config
from fiddler.store.block import BlockLayout
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.host import MappedStore
from fiddler.types import ExpertWeights


def open_experts(model: str | Path, config: EngineConfig) -> LoadedModel:
    """Open a checkpoint for its experts alone: its dense part has shapes and no weights, experts are mapped.

    Raises `ModelError`, and `ConfigError` for options the model cannot meet.
    """
    folder = find_checkpoint(model)
    about = read_config(folder, trust_remote_code=config.trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    resolved = resolve(
        config, checkpoint_dtype=checkpoint_dtype(about, checkpoint), model_context=model_context(about)
    )
    skeleton = meta_skeleton(folder, about, trust_remote_code=config.trust_remote_code)
    experts = seam.find_experts(skeleton)
    layout = expert_layout(skeleton, experts, checkpoint)
    for module in experts.values():
        module.to_empty(device="cpu")  # a norm, where the formula has one; what it multiplies with takes no time
    return LoadedModel(
        model=skeleton,
        experts=experts,
        formulas=tuple(seam.formula(module) for module in experts.values()),
        n_experts=layout.n_experts,
        weights=MappedStore(checkpoint, layout, DTYPES[resolved.dtype]).weights,
    )


def bench_of(loaded: LoadedModel, config: EngineConfig) -> Bench:
    """Return what measures a model that is opened for its experts alone, as the engine would run them.

    Sets this thread's torch threads as the engine sets its own.
    """
    choose_threads(loaded, config, torch.get_num_threads())
    samples = [loaded.weights(layer, 0) for layer in range(len(loaded.n_experts))]
    kernels = calibrated_kernels([m for sample in samples for m in (*sample.up, sample.down)], config)
    if config.device != "sim":
        return Bench(CpuDevice(loaded.weights, loaded.formulas, kernels), loaded.n_experts)
    blocks = _Blocks(loaded.weights)
    largest = max(blocks.layout(layer).nbytes for layer in range(len(samples)))
    arena = Arena(min(sum(loaded.n_experts), max(2, SAMPLE_BYTES // largest + 1)), largest)
    host = CpuDevice(blocks.weights, loaded.formulas, kernels)
    return Bench(host, loaded.n_experts, SimDevice(arena, blocks.block, blocks.layout))


class _Blocks:
    """Experts packed when first asked for: a sample of what `PackedStore` holds whole."""

    def __init__(self, weights: Callable[[int, int], ExpertWeights]) -> None:
        self._mapped = weights
        self._layouts: dict[int, BlockLayout] = {}
        self._blocks: dict[tuple[int, int], Tensor] = {}

    def layout(self, layer: int) -> BlockLayout:
        """Return how a layer's blocks are laid out."""
        if layer not in self._layouts:
            self._layouts[layer] = BlockLayout.of(self._mapped(layer, 0))
        return self._layouts[layer]

    def block(self, layer: int, expert: int) -> Tensor:
        """Return an expert's block."""
        key, layout = (layer, expert), self.layout(layer)
        if key not in self._blocks:
            self._blocks[key] = torch.empty(layout.nbytes, dtype=torch.uint8)
            layout.write(self._mapped(layer, expert), self._blocks[key])
        return self._blocks[key]

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Return an expert's weights as views of its block."""
        return self.layout(layer).views(self.block(layer, expert))
