"""A layer's way through runner, scheduler and three lane threads, where nothing but that takes any time.

What is decided is what would be on a described desktop: its costs are the scheduler's, and every job claims to have
taken what was predicted. What CPU and link take from each other is left out: no two jobs are ever at work together.
"""

from dataclasses import dataclass, replace
from time import perf_counter

from bench.report import Spread
from fiddler.cost.model import Contention
from fiddler.lab.machine import Machine, cost_model
from fiddler.lab.script import Script, ScriptWave
from fiddler.lab.shape import ModelShape
from fiddler.lab.synthetic import SyntheticRouting
from fiddler.lab.systems import System, cache_of, planner, prefetch_of
from fiddler.lanes.runner import Runner
from fiddler.lanes.threads import ThreadLanes
from fiddler.recording import Recording, guesses
from fiddler.scheduler import layer as layers
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.messages import CopyExpert, Job, JobDone, Report, RunExperts
from fiddler.scheduler.routing import LayerWork
from fiddler.scheduler.waves import RowSpan

MODEL, MACHINE = "qwen3-30b-a3b", "rtx4090-desktop"
SHARE = 0.5
"""Of the experts that are resident."""
WARM_UP = 8
"""Steps or hops that are not counted."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer took, step by step, and what was decided in one on average."""

    us: Spread
    hits: float
    on_cpu: float
    fetched: float
    promoted: float
    ahead: float
    """Copied ahead for the next layer."""
    jobs: float
    """Handed to lanes."""


def nothing(_job: Job) -> dict[int, Exception]:
    """Do a job at no cost."""
    return {}


class ToldLanes(ThreadLanes):
    """Lanes whose jobs take no time and say that they took what was predicted, so nothing else is learnt."""

    def __init__(self) -> None:
        super().__init__(nothing)
        self._predicted_s: dict[int, float] = {}
        self.n_jobs = 0

    def start(self, job: Job) -> None:
        """Queue a job for its lane's worker."""
        self.n_jobs += 1
        self._predicted_s[job.job] = job.predicted_s
        super().start(job)

    def report(self) -> Report:
        """Wait for the next report."""
        return self._told(super().report())

    def drain(self) -> list[Report]:
        """Return the reports that are there without waiting."""
        return [self._told(report) for report in super().drain()]

    def _told(self, report: Report) -> Report:
        if not isinstance(report, JobDone):
            return report
        return JobDone(report.job, self._predicted_s.pop(report.job), report.failures)


def layer(system: System, n_layers: int, n_steps: int) -> Layer:
    """Decode a made-up sequence by a system's rules, with `n_layers` of the model's layers."""
    shape = ModelShape.load(MODEL)
    scheduler, lanes = scheduler_of(shape, system, n_layers), ToldLanes()
    runner = Runner(scheduler, lanes)
    runner.preload()
    n_copied = lanes.n_jobs
    routing = SyntheticRouting(n_layers, shape.n_experts, shape.top_k).sequence(0, n_steps)
    script = Script(Recording("scripted", 0, routing, ahead=guesses(routing)))
    times = []
    for token in range(n_steps):
        wave = ScriptWave([RowSpan(script, token, token + 1, last=True)], (shape.n_experts,) * n_layers)
        started = perf_counter()
        runner.run([wave])
        times.append(1e6 * (perf_counter() - started) / n_layers)
    runner.settle()
    lanes.close()
    return _layer(times, scheduler, lanes.n_jobs - n_copied, n_layers * n_steps)


def scheduler_of(shape: ModelShape, system: System, n_layers: int) -> Scheduler:
    """Return what decides for the first layers of a model, by a system's rules."""
    shape = replace(shape, n_layers=n_layers)
    costs = replace(cost_model(shape, Machine.load(MACHINE)), contention=Contention())
    cache = cache_of(system, int(SHARE * shape.total_experts), (shape.n_experts,) * shape.n_layers, shape.top_k)
    ahead = prefetch_of(system.prefetch, cache)
    return Scheduler(cache, costs, planner=planner(system.planner), promote=system.promote, ahead=ahead)


def _layer(times: list[float], scheduler: Scheduler, n_jobs: int, n_layers: int) -> Layer:
    decided = scheduler.counters
    return Layer(
        us=Spread.of(times[WARM_UP:]),
        hits=decided.n_hits / n_layers,
        on_cpu=decided.n_cpu / n_layers,
        fetched=decided.n_fetches / n_layers,
        promoted=decided.n_promotions / n_layers,
        ahead=scheduler.prefetched.n_issued / n_layers,
        jobs=n_jobs / n_layers,
    )


def hop_us(n_hops: int) -> Spread:
    """Return the microseconds from handing a job each to two lanes to having both reports."""
    lanes, nowhere = ThreadLanes(nothing), layers.Layer(layers.Wave(), LayerWork(0, (), ()), 0, 1)
    times = []
    for i in range(n_hops):
        started = perf_counter()
        lanes.start(RunExperts(2 * i, "cpu", nowhere, (), (), 0.0))
        lanes.start(CopyExpert(2 * i + 1, 0, 0, 0, "demand", 0.0))
        for _ in range(2):
            lanes.report()
        times.append(1e6 * (perf_counter() - started))
    lanes.close()
    return Spread.of(times[WARM_UP:])
