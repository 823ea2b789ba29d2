"""The jobs that lanes were given, and what is known of the lanes: how long their queues are, and which are dead."""

from typing import TypeVar

from fiddler.cache.slots import Reservation
from fiddler.cost.correction import Correction
from fiddler.cost.lanes import LANES, LaneName, Lanes
from fiddler.scheduler.layer import LayerRun
from fiddler.scheduler.messages import CopyExpert, DenseQueued, Failures, Job, Reason, RunDense, RunExperts
from fiddler.scheduler.plan import Backlog
from fiddler.scheduler.routing import Load

J = TypeVar("J", RunExperts, CopyExpert, RunDense)


class Jobs:
    """Makes jobs, with the seconds predicted for them, and is the owner of all that were not reported yet."""

    def __init__(self, correction: Correction) -> None:
        self.dead: dict[LaneName, BaseException] = {}
        """Lanes that will do nothing any more, and why."""
        self._correction = correction
        self._jobs: dict[int, Job] = {}
        self._n_made = 0
        self._lanes = Lanes(correction.costs.contention)
        self._now_s = 0.0

    def __bool__(self) -> bool:
        return bool(self._jobs)

    @property
    def all(self) -> list[Job]:
        """Every job, the oldest first."""
        return list(self._jobs.values())

    def pass_to(self, now_s: float) -> None:
        """Let the lanes work until `now_s`."""
        self._lanes.pass_by(now_s - self._now_s)
        self._now_s = now_s

    def on_cpu(self, run: LayerRun, loads: tuple[Load, ...]) -> RunExperts:
        """Queue loads of a layer on the CPU."""
        predicted_s = self._correction.costs.cpu_s(run.layer, [load.n_rows for load in loads])
        return self._start(RunExperts(self._number(), "cpu", run.wave, run.layer, loads, (), predicted_s))

    def on_gpu(self, run: LayerRun, loads: tuple[Load, ...], slots: tuple[int, ...]) -> RunExperts:
        """Queue loads of a layer on the GPU, each from its slot."""
        predicted_s = self._correction.costs.gpu_s(run.layer, [load.n_rows for load in loads])
        return self._start(RunExperts(self._number(), "gpu", run.wave, run.layer, loads, slots, predicted_s))

    def copy(self, reservation: Reservation, reason: Reason) -> CopyExpert:
        """Queue the copy that a slot was reserved for."""
        layer, expert = reservation.key
        copy_s = self._correction.costs.experts[layer].copy_s
        return self._start(CopyExpert(self._number(), layer, expert, reservation.slot, reason, copy_s))

    def dense(self, event: DenseQueued) -> RunDense:
        """Queue a wave's dense part."""
        costs = self._correction.costs
        if event.head:
            predicted_s = costs.dense.head(event.n_rows)
        else:
            predicted_s = costs.dense.layer_s(event.n_rows, event.n_context) + costs.host_s
        return self._start(RunDense(self._number(), event.wave, predicted_s))

    def end(self, number: int) -> tuple[Job, float] | None:
        """Take a job out; returns it and the seconds predicted for it with what it shared the machine with.

        `None` if it is not known: its lane was declared dead before it reported.
        """
        job = self._jobs.pop(number, None)
        if job is None:
            return None
        queued = self._lanes.remove(job.lane, number)
        assert queued is not None, "a job was in no lane's queue"
        return job, queued.work_s * queued.slowdown

    def backlog(self) -> Backlog:
        """Return the work queued in each lane."""
        lanes = self._lanes
        return Backlog(lanes.backlog_s("cpu"), lanes.backlog_s("gpu"), lanes.demand_s())

    def ahead_s(self, number: int) -> float:
        """Return the link's seconds, as it takes alone, until a copy has landed."""
        return self._lanes.ahead_s(number)

    def ahead_of_demand_s(self) -> float:
        """Return the link's seconds, as it takes alone, that a demand copy waits for one that nobody demanded."""
        queue = self._lanes.queues["link"]
        return queue[0].left_s if len(queue) == 1 and not queue[0].urgent else 0.0

    def idle(self, lane: LaneName) -> bool:
        """Whether a lane has nothing to do."""
        return not self._lanes.queues[lane]

    def check(self) -> None:
        """Raise `AssertionError` unless the lanes' queues hold these jobs and dead lanes none."""
        for lane in LANES:
            queued = {queued.job for queued in self._lanes.queues[lane]}
            assert queued == {job.job for job in self.all if job.lane == lane}, f"the {lane} lane's jobs are others"
            assert not queued or lane not in self.dead, f"the {lane} lane is dead and has jobs"

    def _number(self) -> int:
        self._n_made += 1
        return self._n_made - 1

    def _start(self, job: J) -> J:
        self._jobs[job.job] = job
        urgent = job.urgent if isinstance(job, CopyExpert) else True
        self._lanes.put(job.lane, job.job, job.predicted_s, urgent=urgent)
        return job


def undone(job: Job, error: BaseException) -> Failures:
    """Return the failures of a job of which nothing was done."""
    match job:
        case RunExperts():
            return {load.expert: error for load in job.loads}
        case CopyExpert():
            return {job.expert: error}
        case RunDense():
            return {}
