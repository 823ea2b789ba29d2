"""Opens a checkpoint for calibration: reads a sample of experts; dense weights only for a GPU."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from fiddler.calibration.gpu import SLOTS_BYTES, GpuBench
from fiddler.calibration.kernels import calibrated_kernels, choose_threads, compute_lane, expert_matrices
from fiddler.calibration.measure import SAMPLE_BYTES, Bench, Measures
from fiddler.config import EngineConfig, Resolved, resolve
from fiddler.devices.arena import Arena, SimDevice
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.formula import DTYPES
from fiddler.devices.kernels import Kernels
from fiddler.formats.quantise import converted
from fiddler.gpu import cuda
from fiddler.gpu.crossing import Watch
from fiddler.gpu.jobs import Copying, GpuJobs, PinnedRing
from fiddler.gpu.slots import SlotExperts
from fiddler.gpu.stack import Stack
from fiddler.models import seam
from fiddler.models.loaded import LoadedModel, ServableModel, checkpoint_dtype, load, model_context
from fiddler.models.naming import expert_layout
from fiddler.models.opening import open_checkpoint
from fiddler.models.skeleton import meta_skeleton
from fiddler.store.blocks import on_pages
from fiddler.store.folder import find_checkpoint
from fiddler.store.layout import BlockLayout
from fiddler.store.mapped import MappedStore
from fiddler.types import ExpertWeights

Weights = Callable[[int, int], ExpertWeights]
"""(layer, expert) to its weights."""


def open_experts(model: str | Path, config: EngineConfig) -> LoadedModel:
    """Open a checkpoint for its experts only: the dense part has shapes but no weights, experts are mapped.

    For a GPU the dense part is loaded, since it is measured too. Raises `ModelError`, and `ConfigError` for options
    that the model or the machine cannot meet.
    """
    folder = find_checkpoint(model)
    about, checkpoint = open_checkpoint(folder, trust_remote_code=config.trust_remote_code)
    resolved = resolve(
        config,
        checkpoint_dtype=checkpoint_dtype(about, checkpoint),
        model_context=model_context(about),
        has_cuda=torch.cuda.is_available() and config.device == "cuda",
    )
    if resolved.device == "cuda":
        return _with_dense(folder, config, resolved)
    skeleton = meta_skeleton(checkpoint, about, trust_remote_code=config.trust_remote_code)
    experts = seam.find_experts(skeleton)
    layout = expert_layout(skeleton, experts, checkpoint)
    for module in experts.values():
        module.to_empty(device="cpu")  # a norm, where the formula has one; what it multiplies with takes no time
    return LoadedModel(
        model=skeleton,
        experts=experts,
        formulas=tuple(seam.formula(module, halves=checkpoint.is_gguf) for module in experts.values()),
        n_experts=layout.n_experts,
        weights=_as_kept(MappedStore(checkpoint, layout, DTYPES[resolved.dtype]).weights, config, resolved),
        dtype=DTYPES[resolved.dtype],
    )


def _with_dense(folder: Path, config: EngineConfig, resolved: Resolved) -> ServableModel:
    """Open a checkpoint whole, with its experts mapped."""
    here = replace(config, device="cpu", store="mapped", vram_budget=None, expert_dtype="checkpoint")
    loaded = load(folder, here)
    return replace(loaded, resolved=resolved, weights=_as_kept(loaded.weights, config, resolved))


def _as_kept(weights: Weights, config: EngineConfig, resolved: Resolved) -> Weights:
    """Return experts as an engine with this `expert_dtype` keeps them.

    Only the first of a layer is converted, which takes long; others are copies of it, which take as long to run.
    """
    if config.expert_dtype == "checkpoint":
        return weights
    to, dtype = config.expert_dtype, DTYPES[resolved.dtype]

    @lru_cache(None)
    def first(layer: int) -> tuple[BlockLayout, Tensor]:
        made = converted(weights(layer, 0), to, dtype)
        layout = BlockLayout.of(made)
        block = torch.empty(layout.nbytes, dtype=torch.uint8)
        layout.write(made, block)
        return layout, block

    @lru_cache(None)
    def kept(layer: int, expert: int) -> ExpertWeights:
        layout, block = first(layer)
        return layout.views(block.clone())

    first(0)  # what cannot be converted is said before anything is measured
    return kept


@contextmanager
def open_bench(loaded: LoadedModel, config: EngineConfig) -> Generator[Measures]:
    """Yield the bench of a model that `open_experts` has opened.

    Sets this thread's torch threads as the engine sets its own. Raises `ConfigError` where there is no GPU that is
    asked for.
    """
    if config.device != "cuda":
        yield bench_of(loaded, config)
        return
    assert isinstance(loaded, ServableModel)
    gpu, kernels = cuda.open_gpu(), _prepared(loaded, config)
    gpu.enter()
    seam.bind(loaded.experts, compute_lane(loaded, kernels).run)
    norms = [deepcopy(formula.post_norm) for formula in loaded.formulas]  # before the model's move
    formulas = tuple(replace(f, post_norm=norm) for f, norm in zip(loaded.formulas, norms, strict=True))
    model: torch.nn.Module = loaded.model
    model.to(gpu.device)
    blocks = _Blocks(loaded.weights, gpu.pin)
    arena = _arena(loaded, blocks, SLOTS_BYTES, gpu.device)
    experts = SlotExperts(lru_cache(None)(partial(_stack, blocks, arena)), loaded.formulas)
    copying = Copying(arena, blocks.block, blocks.pinned, PinnedRing(gpu))
    host = CpuDevice(blocks.weights, formulas, kernels)
    try:
        yield GpuBench.of(loaded, GpuJobs(gpu, Watch(), host, experts, copying), config)
    finally:
        blocks.unpin(gpu.unpin)


def bench_of(loaded: LoadedModel, config: EngineConfig) -> Bench:
    """Return the bench of a model that is opened for its experts only.

    Sets this thread's torch threads as the engine sets its own. For a GPU, use `open_bench`.
    """
    kernels = _prepared(loaded, config)
    if config.device != "sim":
        return Bench(CpuDevice(loaded.weights, loaded.formulas, kernels), loaded.n_experts, dtype=loaded.dtype)
    blocks = _Blocks(loaded.weights)
    arena = _arena(loaded, blocks, SAMPLE_BYTES)
    host = CpuDevice(blocks.weights, loaded.formulas, kernels)
    return Bench(host, loaded.n_experts, SimDevice(arena, blocks.block, blocks.layout), loaded.dtype)


def _prepared(loaded: LoadedModel, config: EngineConfig) -> Kernels:
    """Set this thread's torch threads, and return the kernels for a model's experts."""
    choose_threads(loaded, config, torch.get_num_threads())
    return calibrated_kernels(expert_matrices(loaded), config)


def _arena(loaded: LoadedModel, blocks: "_Blocks", nbytes: int, device: torch.device | None = None) -> Arena:
    """Return slots for this many bytes of blocks together, if there are as many."""
    largest = max(blocks.layout(layer).nbytes for layer in range(len(loaded.n_experts)))
    return Arena(min(sum(loaded.n_experts), max(2, nbytes // largest + 1)), largest, device)


def _stack(blocks: "_Blocks", arena: Arena, layer: int) -> Stack:
    return Stack.over(arena.slots, blocks.layout(layer))


class _Blocks:
    """Packs experts when they are first asked for: a sample of the blocks that `BlockStore` holds whole.

    Each block is offered to `pin`, if that is given, until one is refused.
    """

    def __init__(
        self, weights: Callable[[int, int], ExpertWeights], pin: Callable[[Tensor], bool] | None = None
    ) -> None:
        self._mapped = weights
        self._pin = pin
        self._layouts: dict[int, BlockLayout] = {}
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._pinned: set[tuple[int, int]] = set()

    def layout(self, layer: int) -> BlockLayout:
        """Return how a layer's blocks are laid out."""
        if layer not in self._layouts:
            self._layouts[layer] = BlockLayout.of(self._mapped(layer, 0))
        return self._layouts[layer]

    def block(self, layer: int, expert: int) -> Tensor:
        """Return an expert's block."""
        key, layout = (layer, expert), self.layout(layer)
        if key not in self._blocks:
            block = self._blocks[key] = self._room(key, layout.nbytes)
            layout.write(self._mapped(layer, expert), block)
        return self._blocks[key]

    def _room(self, key: tuple[int, int], nbytes: int) -> Tensor:
        if self._pin is None:
            return torch.empty(nbytes, dtype=torch.uint8)
        room = on_pages(1, nbytes)[0]
        if self._pin(room):
            self._pinned.add(key)
        else:
            self._pin = None
        return room

    def pinned(self, layer: int, expert: int) -> bool:
        """Whether a block is locked, or would be."""
        return (layer, expert) in self._pinned or ((layer, expert) not in self._blocks and self._pin is not None)

    def unpin(self, unpin: Callable[[Tensor], None]) -> None:
        """Unlock the locked blocks."""
        for key in self._pinned:
            unpin(self._blocks[key])
        self._pinned.clear()

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Return an expert's weights as views of its block."""
        return self.layout(layer).views(self.block(layer, expert))
