"""Lanes of a described machine in virtual time: the clock jumps from one job's end to the next.

A job's numbers are computed when it ends, in the engine's thread, so no job can use a copy that has not landed.
"""

from collections import deque

from fiddler.cost.lanes import Lanes
from fiddler.cost.model import LANES, CostModel, LaneName
from fiddler.lanes.laneset import Execute, span
from fiddler.scheduler.messages import CopyExpert, Job, JobDone, LaneDied, Report, RunDense, RunExperts
from fiddler.trace import Trace


class VirtualLanes:
    """Runs jobs for as many virtual seconds as `costs` predicts; without `execute` only time passes.

    `overlap=False` is a machine that one thread drives: the CPU lane waits for the other two.
    """

    timed_dense = True

    def __init__(
        self,
        costs: CostModel,
        execute: Execute | None = None,
        trace: Trace | None = None,
        *,
        overlap: bool = True,
    ) -> None:
        self._costs = costs
        self._execute = execute
        self._trace = trace
        self._lanes = Lanes(costs.contention, overlap)
        self._jobs: dict[int, Job] = {}
        self._began: dict[int, float] = {}
        self._reports: deque[Report] = deque()
        self._dead: set[LaneName] = set()
        self._now_s = 0.0
        self.busy_s: dict[LaneName, float] = dict.fromkeys(LANES, 0.0)
        """Seconds in which each lane had a job."""
        self.read_bytes: dict[LaneName, int] = dict.fromkeys(LANES, 0)
        """Bytes of experts that each lane computed with, or copied."""

    def now_s(self) -> float:
        """Return the virtual seconds since the machine was made."""
        return self._now_s

    def start(self, job: Job) -> None:
        """Queue a job in its lane."""
        if job.lane in self._dead:
            return
        self._jobs[job.job] = job
        urgent = job.urgent if isinstance(job, CopyExpert) else True
        self._lanes.put(job.lane, job.job, self._seconds(job), urgent=urgent)

    def report(self) -> Report:
        """Jump to the end of the next job and report it. Raises `RuntimeError` if nothing is in flight."""
        while not self._reports:
            self._jump()
        return self._reports.popleft()

    def drain(self) -> list[Report]:
        """Return the reports of the latest moment; only `report` lets the clock jump."""
        if not self._reports:
            return []
        drained, self._reports = list(self._reports), deque()
        return drained

    def close(self) -> None:
        """Do nothing: there is no thread to end."""

    def _jump(self) -> None:
        lanes = self._lanes
        busy = lanes.working()
        seconds = lanes.next_s(busy)
        if seconds is None:
            raise RuntimeError("a report is waited for and no job is in flight")
        for lane in busy:  # not before: what comes in the same moment may make the CPU wait
            self._began.setdefault(lanes.queues[lane][0].job, self._now_s)
            self.busy_s[lane] += seconds
        done = lanes.advance(seconds, busy)
        self._now_s += seconds
        for _, number in done:
            self._end(self._jobs.pop(number))

    def _end(self, job: Job) -> None:
        began_s = self._began.pop(job.job)
        try:
            failures = self._execute(job) if self._execute is not None else {}
        except BaseException as error:
            self._bury(job.lane, error)
            return
        if self._trace is not None:
            self._trace.span(span(job, began_s, self._now_s))
        self._reports.append(JobDone(job.job, self._now_s - began_s, failures))

    def _bury(self, lane: LaneName, error: BaseException) -> None:
        self._dead.add(lane)
        self._lanes.queues[lane].clear()
        for number in [number for number, job in self._jobs.items() if job.lane == lane]:
            del self._jobs[number]
            self._began.pop(number, None)
        self._reports.append(LaneDied(lane, error))

    def _seconds(self, job: Job) -> float:
        match job:
            case RunExperts(lane=lane, layer=layer):
                self.read_bytes[lane] += len(job.loads) * self._costs.experts[layer.index].nbytes
                seconds = self._costs.cpu_s if lane == "cpu" else self._costs.gpu_s
                return seconds(layer.index, [load.n_rows for load in job.loads])
            case CopyExpert(layer=index):
                self.read_bytes["link"] += self._costs.experts[index].nbytes
                return self._costs.experts[index].copy_s
            case RunDense():
                return job.predicted_s
