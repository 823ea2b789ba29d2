"""The experts' side of an engine with an NVIDIA GPU."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial

import torch

from fiddler.config import EngineConfig
from fiddler.cost.model import CostModel
from fiddler.devices.arena import Arena
from fiddler.devices.base import ExpertFormula
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.cuda import CudaGpu
from fiddler.devices.gpu import Gpu
from fiddler.devices.slot_experts import SlotExperts, Stack
from fiddler.devices.staging import StagingRing
from fiddler.engine.costing import no_costs
from fiddler.engine.graphs import Graphs
from fiddler.engine.side import Side
from fiddler.lanes.gpu_crossing import GpuCrossing
from fiddler.lanes.gpu_jobs import Copying, GpuJobs
from fiddler.lanes.streams import StreamLanes
from fiddler.lanes.watch import Watch
from fiddler.models.kv_arena import KvArena
from fiddler.models.loaded import ServableModel
from fiddler.models.lookahead import Lookahead
from fiddler.store.packed import PackedStore
from fiddler.trace import Trace

logger = logging.getLogger("fiddler")


def open_gpu() -> Gpu:
    """Return the GPU that `device='cuda'` means. Raises `ConfigError` where torch sees none."""
    return CudaGpu()


def gpu_side(loaded: ServableModel, host: CpuDevice, config: EngineConfig, trace: Trace | None) -> Side:
    """Move a model's dense part to the GPU and build what runs its experts there and on the host.

    Raises `ConfigError` where the GPU's memory is too small for what `config` asks.
    """
    gpu = open_gpu()
    gpu.enter()
    host = replace(host, formulas=tuple(_staying(formula) for formula in host.formulas))
    model: torch.nn.Module = loaded.model
    model.to(gpu.device)
    store = loaded.store
    assert isinstance(store, PackedStore)
    pinned = store.pin(gpu.pin)
    n_slots = min(sum(loaded.n_experts), config.slots or 0)
    kv_tokens = loaded.resolved.kv_tokens
    assert kv_tokens is not None
    arena = Arena(n_slots, store.block_bytes, gpu.device)
    watch = Watch()
    crossing = GpuCrossing(gpu, watch)
    experts = SlotExperts(lru_cache(None)(partial(_stack, store, arena)), loaded.formulas)
    copying = Copying(arena, store.block, pinned.holds, StagingRing(gpu))
    jobs = GpuJobs(gpu, crossing, host, experts, copying)
    working = partial(torch_worker, torch.get_num_threads())
    costs = _costs(loaded, jobs, config)
    return Side(
        crossing,
        jobs,
        costs,
        n_slots,
        lambda: StreamLanes(jobs, crossing, watch, working=working, trace=trace),
        partial(_graphs, loaded, gpu, KvArena(kv_tokens), config),
        lambda: store.unpin(gpu.unpin),
    )


def _graphs(
    loaded: ServableModel, gpu: Gpu, arena: KvArena, config: EngineConfig, lookahead: Lookahead | None
) -> Graphs | None:
    if not loaded.packed:
        return None
    why_not = "" if config.graphs else "graphs=False"
    if config.defer:
        why_not = f"defer={config.defer}: a layer's results come in two parts"
    return Graphs(loaded.model, gpu, arena, lookahead, why_not)


def _staying(formula: ExpertFormula) -> ExpertFormula:
    """Return a formula whose weights stay on the host when the model's move."""
    norm = formula.post_norm
    return formula if norm is None else replace(formula, post_norm=deepcopy(norm))


def _stack(store: PackedStore, arena: Arena, layer: int) -> Stack:
    """Return all slots as experts of a layer."""
    return Stack.over(arena.slots, arena.views(0, store.layout(layer)))


def _costs(loaded: ServableModel, jobs: GpuJobs, config: EngineConfig) -> CostModel:
    return no_costs(len(loaded.n_experts))


@contextmanager
def torch_worker(n_threads: int) -> Generator[None]:
    """Be a lane's worker: modes and thread counts are each thread's own in torch."""
    torch.set_num_threads(n_threads)
    with torch.inference_mode():
        yield
