"""The numbers behind the jobs: a layer's rows, the weights a lane runs them on, their results."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from torch import Tensor

from fiddler.cost.lanes import LANES, LaneName
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.scheduler.messages import CopyExpert, Failures, Job, RunExperts
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights, LaneStatistics


class Accelerator(Protocol):
    """A memory of slots beside the host's."""

    def copy(self, layer: int, expert: int, slot: int) -> None:
        """Copy an expert's block into a slot."""
        ...

    def weights(self, layer: int, slot: int) -> ExpertWeights:
        """Return what lies in a slot as an expert of `layer`."""
        ...


@dataclass(slots=True)
class LaneCounters:
    """What one lane has done; its worker is the only writer."""

    n_rows: int = 0
    n_loads: int = 0
    n_bytes: int = 0
    busy_s: float = 0.0

    def snapshot(self) -> LaneStatistics:
        """Return the state now."""
        return LaneStatistics(self.n_rows, self.n_loads, self.n_bytes, self.busy_s)


@dataclass(slots=True)
class _Buffers:
    rows: Tensor  # [n, H], in the work's order
    out: Tensor  # [n, H]


@dataclass(slots=True)
class ExpertWork:
    """Does the work of jobs, in whichever thread calls; loads write disjoint rows, so lanes need no lock.

    A job whose layer was let go does nothing.
    """

    host: CpuDevice
    accelerator: Accelerator | None = None
    counters: dict[LaneName, LaneCounters] = field(default_factory=lambda: {lane: LaneCounters() for lane in LANES})
    short: bool = False
    """Whether memory ran out; whoever finds more sets this back."""
    _open: dict[tuple[int, int], _Buffers] = field(default_factory=dict)

    def open(self, wave: int, layer: int, rows: Tensor) -> None:
        """Take a layer's rows `[n, H]`, one per visit, before its jobs start."""
        self._open[wave, layer] = _Buffers(rows, empty_results(rows))

    def results(self, wave: int, layer: int, failed: Iterable[Load] = ()) -> Tensor:
        """Return a layer's outputs `[n, H]`, zero for loads that failed. Those that still run are not there yet."""
        out = self._open[wave, layer].out
        for load in failed:
            out[load.start : load.stop] = 0
        return out

    def let_go(self, wave: int, layer: int) -> None:
        """Forget a layer's rows and results; nothing happens if it is not open."""
        self._open.pop((wave, layer), None)

    def __call__(self, job: Job) -> Failures:
        """Do a job; returns what failed by expert."""
        started = perf_counter()
        match job:
            case RunExperts():
                failures = self._run(job)
            case CopyExpert():
                failures = self._copy(job)
            case _:
                return {}
        self.counters[job.lane].busy_s += perf_counter() - started
        return failures

    def _run(self, job: RunExperts) -> Failures:
        buffers = self._open.get((job.wave, job.layer))
        if buffers is None:
            return {}
        return all_or_each(job.loads, lambda which: self._run_loads(job, which, buffers))

    def _run_loads(self, job: RunExperts, which: Sequence[int], buffers: _Buffers) -> None:
        loads, weights = [job.loads[i] for i in which], [self._weights(job, i) for i in which]
        self.host.run(job.layer, loads, weights, buffers.rows, buffers.out)
        counters = self.counters[job.lane]
        counters.n_rows += sum(load.n_rows for load in loads)
        counters.n_loads += len(loads)
        counters.n_bytes += sum(own.nbytes for own in weights)

    def _weights(self, job: RunExperts, i: int) -> ExpertWeights:
        if job.lane == "cpu":
            return self.host.weights(job.layer, job.loads[i].expert)
        assert self.accelerator is not None
        return self.accelerator.weights(job.layer, job.slots[i])

    def _copy(self, job: CopyExpert) -> Failures:
        assert self.accelerator is not None
        try:
            self.accelerator.copy(job.layer, job.expert, job.slot)
            nbytes = self.accelerator.weights(job.layer, job.slot).nbytes
        except BaseException as error:
            return {job.expert: error}
        counters = self.counters["link"]
        counters.n_loads += 1
        counters.n_bytes += nbytes
        return {}


def all_or_each(loads: Sequence[Load], run: Callable[[Sequence[int]], None]) -> Failures:
    """Run loads, by their places; returns what failed by expert: if any did, each was run alone to see which."""
    try:
        run(range(len(loads)))
    except BaseException:
        failures: dict[int, BaseException] = {}
        for i, load in enumerate(loads):
            try:
                run((i,))
            except BaseException as error:
                failures[load.expert] = error
        return failures
    return {}
