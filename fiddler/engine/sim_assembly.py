"""The experts' side of an engine with a simulated accelerator."""

from functools import partial

import torch

from fiddler.calibration.costs import calibrate
from fiddler.calibration.kernels import torch_worker
from fiddler.calibration.measure import Bench
from fiddler.config import EngineConfig, Resolved
from fiddler.cost.model import CostModel, no_costs
from fiddler.devices.arena import Arena, SimDevice
from fiddler.devices.cpu import CpuDevice
from fiddler.engine.assembly import Side
from fiddler.errors import ConfigError
from fiddler.lanes.experts import ExpertWork, HostCrossing
from fiddler.lanes.laneset import LaneSet
from fiddler.lanes.threads import ThreadLanes
from fiddler.lanes.virtual import VirtualLanes
from fiddler.models.loaded import ServableModel
from fiddler.store.blocks import BlockStore
from fiddler.trace import Trace

SHARE = 0.25
"""Of all experts, how many a simulated accelerator holds unless told."""


def sim_side(loaded: ServableModel, host: CpuDevice, config: EngineConfig, trace: Trace | None) -> Side:
    """Build a second arena in RAM, with what it does in wall time or in a described machine's."""
    accelerator = _accelerator(loaded, config)
    work = ExpertWork(host, accelerator)
    costs = _costs(loaded, host, accelerator, config)
    return Side(
        HostCrossing, work, costs, accelerator.arena.n_slots, lambda: _lanes(loaded.resolved, work, costs, trace)
    )


def _accelerator(loaded: ServableModel, config: EngineConfig) -> SimDevice:
    store = loaded.store
    assert isinstance(store, BlockStore)
    total = sum(loaded.n_experts)
    n_slots = min(total, round(total * SHARE) if config.slots is None else config.slots)
    try:
        arena = Arena(n_slots, store.block_bytes)
    except RuntimeError as error:  # torch's out of memory
        raise ConfigError(f"no memory for slots={n_slots} of {store.block_bytes} bytes; set fewer") from error
    if loaded.resolved.machine is not None:  # its clock says what a copy takes
        return SimDevice(arena, store.block, store.layout, link_bytes_per_s=None)
    return SimDevice(arena, store.block, store.layout)


def _costs(loaded: ServableModel, host: CpuDevice, accelerator: SimDevice, config: EngineConfig) -> CostModel:
    if loaded.resolved.machine is not None:
        # the one place where an engine takes something from the lab
        from fiddler.lab.machine import described_costs

        return described_costs(loaded.resolved.machine, loaded)
    if not accelerator.arena.n_slots:
        return no_costs(len(loaded.n_experts))
    return calibrate(Bench(host, loaded.n_experts, accelerator, loaded.dtype), loaded, config).costs


def _lanes(resolved: Resolved, work: ExpertWork, costs: CostModel, trace: Trace | None) -> LaneSet:
    if resolved.machine is not None:
        return VirtualLanes(costs, work, trace)
    return ThreadLanes(work, working=partial(torch_worker, torch.get_num_threads()), trace=trace)
