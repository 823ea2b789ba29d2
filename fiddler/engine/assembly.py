"""Puts an engine's parts together: cache, scheduler, lanes, runner, steps; saves and restores scores."""

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policies import make_cache
from fiddler.calibration.kernels import compute_lane
from fiddler.config import EngineConfig
from fiddler.cost.model import CostModel, no_costs
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.kernels import Kernels
from fiddler.errors import ConfigError
from fiddler.given import read_json
from fiddler.lanes.experts import Crossing, ExpertWork, HostCrossing
from fiddler.lanes.laneset import InlineLanes, LaneSet
from fiddler.lanes.runner import Runner
from fiddler.models import seam
from fiddler.models.loaded import ServableModel
from fiddler.scheduler.cpu_only import CpuOnly
from fiddler.scheduler.waves import Waves
from fiddler.steps.recorder import Recorder
from fiddler.steps.step import StepRunner
from fiddler.steps.wave import Experts
from fiddler.trace import Trace

if TYPE_CHECKING:
    from fiddler.gpu.jobs import GpuJobs
    from fiddler.models.lookahead import Lookahead
    from fiddler.scheduler.core import Scheduler
    from fiddler.steps.graphs import Graphs, Resident


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


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Side:
    """The parts of an engine that differ by device: they run a model's experts.

    The model's own side only knows the crossing.
    """

    crossing: Callable[[], Crossing]
    """Makes a wave's own crossing."""
    work: "ExpertWork | GpuJobs"
    """Runs the lanes' jobs."""
    costs: CostModel
    n_slots: int
    lanes: Callable[[], LaneSet]
    """Starts the lanes and their threads."""
    graphs: "Graphs | None" = None
    """Records decoding steps, and knows where keys and values lie: for packed models on a GPU."""
    residents: "Callable[[ExpertCache], Callable[[], Resident | None]] | None" = None
    """Given the cache, returns a function that yields the `Resident` runner while every expert is in a slot, else
    `None`."""
    shrink: Callable[[], int] | None = None
    """Gives slots up when a GPU's memory has run out, while no lane works; returns how many are left, all empty."""
    close: Callable[[], None] = _nothing
    """Releases everything; call it once the lanes have ended."""


DEFER_FROM = 6
"""Least experts a token for which deferring one is sound. Source: KTransformers, SOSP 2025."""


@dataclass(frozen=True, slots=True)
class Rig:
    """All parts of one engine, for as long as it is open."""

    scheduler: "Scheduler | CpuOnly"
    lanes: LaneSet
    side: Side
    runner: Runner
    steps: StepRunner
    trace: Trace | None
    recorder: Recorder | None
    config: EngineConfig

    def relieve(self) -> bool:
        """Give slots up, so that work that ran out of GPU memory finds room; returns whether that was possible."""
        self.side.work.short = False
        if self.side.shrink is None or not self.scheduler.cache.n_slots:
            return False
        self.runner.settle()
        self.scheduler.cache.shrink(self.side.shrink())
        self.runner.preload()
        return True

    def close(self) -> None:
        """Let the lanes finish, end them, and save the cache's scores."""
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
    side = _side(loaded, host, config, trace)
    try:
        return _assembled(loaded, side, n_deferred, config, trace)
    except BaseException:
        side.close()
        raise


def _assembled(
    loaded: ServableModel, side: Side, n_deferred: int, config: EngineConfig, trace: Trace | None
) -> Rig:
    cache = make_cache(config.policy, side.n_slots, loaded.n_experts, half_life=config.half_life)
    restore(cache, config.warm_start)
    scheduler = _scheduler(loaded, cache, side.costs, config, trace)
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


def _side(loaded: ServableModel, host: CpuDevice, config: EngineConfig, trace: Trace | None) -> Side:
    """Build where experts run. What only an accelerator needs is imported here and below, when one is asked for."""
    if loaded.resolved.device == "cpu":
        work = ExpertWork(host, None)
        return Side(HostCrossing, work, no_costs(len(loaded.n_experts)), 0, lambda: InlineLanes(work, trace))
    if loaded.resolved.device == "sim":
        from fiddler.engine.sim_assembly import sim_side as side
    else:
        from fiddler.engine.gpu_assembly import gpu_side as side
    return side(loaded, host, config, trace)


def _scheduler(
    loaded: ServableModel, cache: ExpertCache, costs: CostModel, config: EngineConfig, trace: Trace | None
) -> "Scheduler | CpuOnly":
    if loaded.resolved.device == "cpu":
        return CpuOnly(cache, costs, trace)
    from fiddler.scheduler.core import scheduler_for

    return scheduler_for(config, cache, costs, trace)


def _lookahead(loaded: ServableModel, n_slots: int, config: EngineConfig) -> "Lookahead | None":
    """Return the look-ahead, if prefetch or a recording uses it."""
    asked = 0 < n_slots < sum(loaded.n_experts) and config.asks_routers
    if not asked and not config.record:
        return None
    from fiddler.models.lookahead import Lookahead

    return Lookahead(loaded.model, loaded.experts)


def _deferred(loaded: ServableModel, config: EngineConfig) -> int:
    if config.defer and loaded.top_k < DEFER_FROM:
        raise ConfigError(
            f"defer={config.defer} needs a model with at least {DEFER_FROM} experts a token; "
            f"this one has {loaded.top_k}: set defer=0"
        )
    return config.defer
