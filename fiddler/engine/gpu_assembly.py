"""Puts the experts' side of an engine together for an NVIDIA GPU, and divides the GPU's memory for it.

Memory is divided before anything large is allocated. What a step takes, beside weights, is found by running one
step that visits no expert.
"""

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
from fiddler.engine.assembly import Side
from fiddler.errors import ConfigError
from fiddler.gpu import cuda
from fiddler.gpu.budget import Division, budget, divide, shrunk
from fiddler.gpu.crossing import Watch
from fiddler.gpu.device import Gpu
from fiddler.gpu.jobs import Copying, GpuJobs, PinnedRing
from fiddler.gpu.scratch import scratch_bytes
from fiddler.gpu.slots import SlotExperts, ability_of
from fiddler.gpu.stack import Stack
from fiddler.gpu.streams import StreamLanes
from fiddler.models.kv import KvArena, SequenceKV
from fiddler.models.loaded import ServableModel
from fiddler.models.packing import DryStep, dry_step
from fiddler.steps.graphs import Graphs, Resident
from fiddler.steps.request import past_bytes
from fiddler.store.blocks import BlockStore
from fiddler.trace import Trace

logger = logging.getLogger("fiddler")


def gpu_side(loaded: ServableModel, host: CpuDevice, config: EngineConfig, trace: Trace | None) -> Side:
    """Move a model's dense part to the GPU, and build the parts that run its experts there and on the host.

    Raises `ConfigError` where the GPU's memory is too small for `config`.
    """
    gpu = cuda.open_gpu()
    gpu.enter()
    store = loaded.store
    assert isinstance(store, BlockStore)
    host = replace(host, formulas=tuple(_staying(formula) for formula in host.formulas))
    ring = PinnedRing(gpu)  # first: blocks take what can be pinned, and it is for when nothing more can
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
    room: Division
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
        assert isinstance(store, BlockStore)
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


def _stack(store: BlockStore, arena: Arena, layer: int) -> Stack:
    """Return all slots as experts of a layer."""
    return Stack.over(arena.slots, store.layout(layer))


def _arena(room: Division, gpu: Gpu) -> Arena:
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


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of GPU memory."""

    kv_token: int
    """One token's keys and values, over all layers."""
    workspace: int
    """Bytes of the largest step: activations, the rows of experts' visits, and decoded weights."""


def needs(loaded: ServableModel, gpu: Gpu, n_rows: int) -> Needs:
    """Run a step of `n_rows` tokens of one sequence, with experts that give zero.

    Its torch calls go to the main stream. Raises `torch.OutOfMemoryError` where not even that fits.
    """
    steps: list[DryStep] = []

    def run() -> None:
        steps.append(dry_step(loaded.model, n_rows, packed=loaded.packed))

    with torch.inference_mode():
        peak = gpu.launch(lambda: gpu.peak(run))
        past = steps.pop().past
        held = past.token_bytes if isinstance(past, SequenceKV) else -(-past_bytes(past) // n_rows)
    beside = _visits_bytes(loaded, n_rows) + _mask_bytes(loaded, n_rows) + _decoded_bytes(loaded, gpu)
    return Needs(held, peak + beside)


def _mask_bytes(loaded: ServableModel, n_rows: int) -> int:
    """Return the bytes of the largest attention mask: one bool and one 16-bit bias per (row, past token).

    Query heads that share a key head have it once each: see `_tiled` in models/attention.py.
    """
    groups = max(getattr(module, "num_key_value_groups", 1) for module in loaded.model.modules())
    longest = loaded.resolved.longest
    return 3 * groups * n_rows * longest if loaded.packed and longest > n_rows else 0


def _visits_bytes(loaded: ServableModel, n_rows: int) -> int:
    """Return the bytes of a layer's visits while its experts run: results, and the values between up and down."""
    widest = 0
    for layer in range(len(loaded.n_experts)):
        weights = loaded.weights(layer, 0)
        n_hidden, n_between = weights.down.shape
        ups = sum(matrix.shape[0] for matrix in weights.up)
        widest = max(widest, (2 * n_hidden + ups + n_between) * loaded.dtype.itemsize)
    return n_rows * loaded.top_k * widest


def _decoded_bytes(loaded: ServableModel, gpu: Gpu) -> int:
    """Return the bytes of the scratch in which quantised experts of many rows are decoded."""
    kernels = ability_of(gpu.device).runs_triton
    layers = enumerate(loaded.n_experts)
    sizes = (scratch_bytes(loaded.weights(layer, 0), n, loaded.dtype, kernels=kernels) for layer, n in layers)
    return max(sizes, default=0)


GRAPHS_BYTES = 256 << 20
"""Bytes left for recorded steps, and for the libraries' own buffers. Assumed, not measured: a piece of a step uses
as much as a layer's dense part, which is little for the rows of a recorded step, and all kinds of one wave share
it."""


def divided(loaded: ServableModel, gpu: Gpu, config: EngineConfig) -> Division:
    """Move the dense part to the GPU, measure a step, and give the rest of the memory to slots.

    Raises `ConfigError`, with a table of needs and budget, where it is too little.
    """
    model: torch.nn.Module = loaded.model
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    dense_bytes = sum(tensor.nbytes for tensor in tensors.values())
    allowed = budget(config.vram_budget, gpu.memory().free)
    nothing_else = Needs(kv_token=0, workspace=0)
    _room(loaded, config, allowed, dense_bytes, nothing_else)  # refuse before what cannot fit is moved
    try:
        model.to(gpu.device)
        taken = needs(loaded, gpu, min(config.chunk_tokens, loaded.resolved.longest))
        gpu.reclaim()
        # The libraries have loaded by now, and what they took is nobody's any more.
        allowed = min(allowed, budget(None, gpu.memory().free + dense_bytes))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU has no memory for a step of chunk_tokens={config.chunk_tokens} beside {dense_bytes} bytes of "
            f"dense weights; set chunk_tokens lower, or end what else uses the GPU: {error}"
        ) from error
    room = _room(loaded, config, allowed, dense_bytes, taken)
    logger.info("GPU memory of %s:\n%s", gpu.name, room.table())
    return room


def _room(loaded: ServableModel, config: EngineConfig, allowed: int, dense_bytes: int, taken: Needs) -> Division:
    store = loaded.store
    assert isinstance(store, BlockStore)
    return divide(
        allowed,
        dense_bytes=dense_bytes,
        kv_token_bytes=taken.kv_token,
        kv_tokens=loaded.resolved.kv_tokens or 0,
        workspace_bytes=taken.workspace + (GRAPHS_BYTES if config.graphs and loaded.packed else 0),
        slot_bytes=store.block_bytes,
        n_experts=sum(loaded.n_experts),
        asked_slots=config.slots,
    )
