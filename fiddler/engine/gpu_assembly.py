"""Puts the experts' side of an engine together for an NVIDIA GPU."""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from fiddler.cache.cache import ExpertCache
from fiddler.calibration.gpu import calibrate_gpu
from fiddler.calibration.kernels import torch_worker
from fiddler.config import EngineConfig
from fiddler.cost.model import CostModel
from fiddler.devices.arena import Arena
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.formula import ExpertFormula
from fiddler.engine.gpu_memory import divided
from fiddler.engine.side import Side
from fiddler.errors import ConfigError
from fiddler.gpu import cuda
from fiddler.gpu.budget import Room, shrunk
from fiddler.gpu.crossing import Watch
from fiddler.gpu.device import Gpu
from fiddler.gpu.jobs import Copying, GpuJobs
from fiddler.gpu.ring import StagingRing
from fiddler.gpu.slots import SlotExperts
from fiddler.gpu.stack import Stack
from fiddler.gpu.streams import StreamLanes
from fiddler.models.kv import KvArena
from fiddler.models.loaded import ServableModel
from fiddler.steps.graphs import Graphs, Resident
from fiddler.store.blocks import PackedStore
from fiddler.trace import Trace

logger = logging.getLogger("fiddler")


def gpu_side(loaded: ServableModel, host: CpuDevice, config: EngineConfig, trace: Trace | None) -> Side:
    """Move a model's dense part to the GPU, and build the parts that run its experts there and on the host.

    Raises `ConfigError` where the GPU's memory is too small for `config`.
    """
    gpu = cuda.open_gpu()
    gpu.enter()
    store = loaded.store
    assert isinstance(store, PackedStore)
    host = replace(host, formulas=tuple(_staying(formula) for formula in host.formulas))
    ring = StagingRing(gpu)  # first: blocks take what can be pinned, and it is for when nothing more can
    pinned = store.pin(gpu.pin)  # before memory is divided: the GPU keeps a list of what is locked
    try:
        room = divided(loaded, gpu, config)
        arena = _arena(room, gpu)
        stacks = lru_cache(None)(partial(_stack, store, arena))
        experts = SlotExperts(stacks, loaded.formulas)
        copying = Copying(arena, store.block, pinned.holds, ring)
        jobs = GpuJobs(gpu, Watch(), host, experts, copying)
        memory = GpuMemory(loaded, jobs, room, _graphs(loaded, gpu, config), stacks.cache_clear)
        costs = _costs(loaded, jobs, config)
    except BaseException:
        store.unpin(gpu.unpin)
        raise
    working = partial(torch_worker, torch.get_num_threads())
    return Side(
        jobs.crossing,
        jobs,
        costs,
        memory.room.slots,
        lambda: StreamLanes(jobs, working=working, trace=trace),
        memory.graphs,
        lambda cache: Residency(cache, loaded, jobs).now,
        memory.shrink if memory.room.slots else None,
        memory.close,
    )


@dataclass(slots=True)
class GpuMemory:
    """Owner of an engine's GPU memory, and of the blocks that are locked for the GPU."""

    loaded: ServableModel
    jobs: GpuJobs
    room: Room
    graphs: Graphs | None
    forget_stacks: Callable[[], None]
    """Drops views of the slots."""

    def shrink(self) -> int:
        """Give slots up for workspace; returns how many are left."""
        self.room = shrunk(self.room, self.room.slot_bytes)
        logger.warning("GPU memory ran out; it is now:\n%s", self.room.table())
        self._empty(self.room.slots)
        return self.room.slots

    def close(self) -> None:
        """Give everything back now: a closed engine may still be held for its statistics."""
        store, gpu = self.loaded.store, self.jobs.gpu
        assert isinstance(store, PackedStore)
        store.unpin(gpu.unpin)
        self._empty(0)
        if self.graphs is not None:
            self.graphs.arena.clear()
        model: torch.nn.Module = self.loaded.model
        model.to("cpu")
        gpu.reclaim()

    def _empty(self, n_slots: int) -> None:
        self.forget_stacks()
        if self.graphs is not None:
            self.graphs.forget()
        self.jobs.shrink(n_slots)


def _stack(store: PackedStore, arena: Arena, layer: int) -> Stack:
    """Return all slots as experts of a layer."""
    return Stack.over(arena.slots, store.layout(layer))


def _arena(room: Room, gpu: Gpu) -> Arena:
    try:
        return Arena(room.slots, room.slot_bytes, gpu.device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's free memory is in pieces: no room for the slots of\n{room.table()}\nset vram_budget lower"
        ) from error


class Residency:
    """Finds out whether every expert of a model is in a slot; from then on no expert moves."""

    def __init__(self, cache: ExpertCache, loaded: ServableModel, jobs: GpuJobs) -> None:
        self._cache = cache
        self._n_experts = loaded.n_experts
        self._slots = lru_cache(None)(partial(self._table, jobs.gpu.device))
        self._resident = Resident(jobs.experts, self._slots, jobs.counters["gpu"])

    def now(self) -> Resident | None:
        """Return the `Resident` that runs layers without the host, if every expert is in a slot; else `None`."""
        if self._cache.n_ready < sum(self._n_experts):
            self._slots.cache_clear()
            return None
        return self._resident

    def _table(self, device: torch.device, layer: int) -> Tensor:
        """Return a layer's slots by expert, int32 `[E]`."""
        slots = [self._cache.slot((layer, expert)) for expert in range(self._n_experts[layer])]
        return torch.tensor(slots, dtype=torch.int32).to(device)


def _graphs(loaded: ServableModel, gpu: Gpu, config: EngineConfig) -> Graphs | None:
    if not loaded.packed:
        return None
    why_not = "" if config.graphs else "graphs=False"
    if config.defer:
        why_not = f"defer={config.defer}: a layer's results come in two parts"
    if loaded.rotary is not None:
        why_not = "how tokens are rotated depends on the lengths of their sequences"
    assert loaded.resolved.kv_tokens is not None
    arena = KvArena(loaded.resolved.kv_tokens)
    return Graphs(loaded.model, gpu, arena, loaded.top_k * len(loaded.n_experts), why_not)


def _staying(formula: ExpertFormula) -> ExpertFormula:
    """Return a formula whose weights stay on the host when the model's move."""
    norm = formula.post_norm
    return formula if norm is None else replace(formula, post_norm=deepcopy(norm))


def _costs(loaded: ServableModel, jobs: GpuJobs, config: EngineConfig) -> CostModel:
    return calibrate_gpu(loaded, jobs, config).costs
