"""Puts the parts together: what a model's experts run on, who decides, and how its steps are driven.

What a cache has learnt, kept between runs in a file.
"""

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fiddler.cache.cache import ExpertCache
from fiddler.calibration.costs import calibrate, costs_on, no_costs
from fiddler.calibration.kernels import compute_lane
from fiddler.calibration.measure import Bench
from fiddler.config import EngineConfig, Resolved
from fiddler.cost.model import CostModel
from fiddler.devices.arena import Arena
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.kernels import Kernels
from fiddler.devices.sim import SimDevice
from fiddler.engine.gpu_assembly import gpu_side, torch_worker
from fiddler.engine.side import Side
from fiddler.errors import ConfigError
from fiddler.given import read_json
from fiddler.lab.machine import Machine
from fiddler.lab.systems import System, cache_of, planner, prefetch_of
from fiddler.lanes.experts import ExpertWork, HostCrossing
from fiddler.lanes.inline import InlineLanes
from fiddler.lanes.laneset import LaneSet
from fiddler.lanes.runner import Runner
from fiddler.lanes.threads import ThreadLanes
from fiddler.lanes.virtual import VirtualLanes
from fiddler.models import seam
from fiddler.models.loaded import ServableModel
from fiddler.models.lookahead import Lookahead
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.cpu_only import CpuOnly
from fiddler.scheduler.waves import Waves
from fiddler.steps.recorder import Recorder
from fiddler.steps.step import StepRunner
from fiddler.steps.wave import Experts
from fiddler.store.blocks import PackedStore
from fiddler.trace import Trace

logger = logging.getLogger("fiddler")


def save(cache: ExpertCache, file: Path | None) -> None:
    """Write a cache's scores; a reader finds the old file or the new one, never half of one."""
    if file is not None:
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(cache.state()))
            new.replace(file)
        except OSError as error:  # the run is over and its tokens are out: nobody is left to raise it to
            logger.warning("warm_start=%r was not written: %s", str(file), error)
            with suppress(OSError):
                new.unlink(missing_ok=True)


def restore(cache: ExpertCache, file: Path | None) -> None:
    """Read a cache's scores; nothing happens if there is no file yet. Raises `ConfigError` for another model's."""
    if file is not None:
        try:
            if file.exists():
                cache.restore(read_json(file))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"warm_start={str(file)!r} cannot be used: {error}; give another file") from error


SHARE = 0.25
"""Of all experts, how many a simulated accelerator holds unless told."""
DEFER_FROM = 6
"""Experts a token from which on deferring one is sound. Source: KTransformers, SOSP 2025."""


@dataclass(frozen=True, slots=True)
class Rig:
    """One engine's machine; it lives as long as the engine."""

    scheduler: Scheduler | CpuOnly
    lanes: LaneSet
    side: Side
    runner: Runner
    steps: StepRunner
    trace: Trace | None
    recorder: Recorder | None
    config: EngineConfig

    def relieve(self) -> bool:
        """Have fewer slots, so that what a GPU's memory ran out for finds room; whether that was possible."""
        self.side.work.short = False
        if self.side.shrink is None or not self.scheduler.cache.n_slots:
            return False
        self.runner.settle()
        self.scheduler.cache.shrink(self.side.shrink())
        self.runner.preload()
        return True

    def close(self) -> None:
        """Let the lanes finish, end them, and save what the cache has learnt."""
        try:
            self.runner.settle()
        finally:
            self.lanes.close()
            self.side.close()
            if self.scheduler.cache.n_slots:
                save(self.scheduler.cache, self.config.warm_start)


def assemble_rig(loaded: ServableModel, kernels: Kernels, config: EngineConfig) -> Rig:
    """Build a model's machine as `config` says. Raises `ConfigError`."""
    seam.bind(loaded.experts, compute_lane(loaded, kernels).run)
    trace = Trace() if config.trace else None
    host = CpuDevice(loaded.weights, loaded.formulas, kernels)
    n_deferred = _deferred(loaded, config)
    side = (gpu_side if loaded.resolved.device == "cuda" else _host_side)(loaded, host, config, trace)
    try:
        return _assembled(loaded, side, n_deferred, config, trace)
    except BaseException:
        side.close()
        raise


def _assembled(
    loaded: ServableModel, side: Side, n_deferred: int, config: EngineConfig, trace: Trace | None
) -> Rig:
    cache = _cache(loaded, side.n_slots, config)
    scheduler = _scheduler(loaded.resolved, cache, side.costs, config, trace)
    lookahead = _lookahead(loaded, side.n_slots, config)
    if side.graphs is not None:
        side.graphs.lookahead = lookahead
        if side.residents is not None and not config.record:  # for that the host has to hear of every visit
            side.graphs.resident = side.residents(cache)
    experts = Experts(side.crossing, loaded.n_experts, n_deferred, lookahead)
    recorder = Recorder(loaded.n_experts) if config.record else None
    lanes = side.lanes()  # last of what can fail: its threads live from here on
    runner = Runner(scheduler, lanes)
    waves = Waves(config.waves, scheduler, loaded.top_k)
    steps = StepRunner(loaded, runner, experts, waves, recorder, side.graphs)
    return Rig(scheduler, lanes, side, runner, steps, trace, recorder, config)


def _host_side(loaded: ServableModel, host: CpuDevice, config: EngineConfig, trace: Trace | None) -> Side:
    resolved = loaded.resolved
    accelerator = _accelerator(loaded, config) if resolved.device == "sim" else None
    work = ExpertWork(host, accelerator)
    costs = _costs(loaded, host, accelerator, config)
    n_slots = accelerator.arena.n_slots if accelerator is not None else 0
    return Side(HostCrossing, work, costs, n_slots, lambda: _lanes(resolved, work, costs, trace))


def _scheduler(
    resolved: Resolved, cache: ExpertCache, costs: CostModel, config: EngineConfig, trace: Trace | None
) -> Scheduler | CpuOnly:
    if resolved.device == "cpu":
        return CpuOnly(cache, costs, trace)
    return Scheduler(
        cache,
        costs,
        planner=planner(config.planner),
        promote=config.promote,
        ahead=prefetch_of(config.prefetch, cache),
        trace=trace,
    )


def _accelerator(loaded: ServableModel, config: EngineConfig) -> SimDevice:
    store = loaded.store
    assert isinstance(store, PackedStore)
    total = sum(loaded.n_experts)
    n_slots = min(total, round(total * SHARE) if config.slots is None else config.slots)
    try:
        arena = Arena(n_slots, store.block_bytes)
    except RuntimeError as error:  # torch's out of memory
        raise ConfigError(f"no memory for slots={n_slots} of {store.block_bytes} bytes; set fewer") from error
    if loaded.resolved.machine is not None:  # its clock says what a copy takes
        return SimDevice(arena, store.block, store.layout, link_bytes_per_s=None)
    return SimDevice(arena, store.block, store.layout)


def _costs(
    loaded: ServableModel, host: CpuDevice, accelerator: SimDevice | None, config: EngineConfig
) -> CostModel:
    if loaded.resolved.machine is not None:
        return costs_on(Machine.load(loaded.resolved.machine), loaded)
    if accelerator is None or not accelerator.arena.n_slots:
        return no_costs(len(loaded.n_experts))
    return calibrate(Bench(host, loaded.n_experts, accelerator), loaded, config).costs


def _cache(loaded: ServableModel, n_slots: int, config: EngineConfig) -> ExpertCache:
    placed = System(policy=config.policy, half_life=config.half_life)
    cache = cache_of(placed, n_slots, loaded.n_experts, loaded.top_k)
    restore(cache, config.warm_start)
    return cache


def _lanes(resolved: Resolved, work: ExpertWork, costs: CostModel, trace: Trace | None) -> LaneSet:
    if resolved.machine is not None:
        return VirtualLanes(costs, work, trace)
    if resolved.device == "sim":
        return ThreadLanes(work, working=partial(torch_worker, torch.get_num_threads()), trace=trace)
    return InlineLanes(work, trace)


def _lookahead(loaded: ServableModel, n_slots: int, config: EngineConfig) -> Lookahead | None:
    """Return what asks routers early, where somebody wants to know: what copies ahead by it, or a recording."""
    asked = 0 < n_slots < sum(loaded.n_experts) and config.asks_routers
    return Lookahead(loaded.model, loaded.experts) if asked or config.record else None


def _deferred(loaded: ServableModel, config: EngineConfig) -> int:
    if config.defer and loaded.top_k < DEFER_FROM:
        raise ConfigError(
            f"defer={config.defer} needs a model with at least {DEFER_FROM} experts a token; "
            f"this one has {loaded.top_k}: set defer=0"
        )
    return config.defer
