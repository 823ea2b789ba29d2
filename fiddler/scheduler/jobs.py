"""The jobs that lanes were given, and what is known of the lanes: how long their queues are, and which are dead.

Copies under way, and the loads that wait for them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cache.slots import Reservation
from fiddler.cost.correction import Correction
from fiddler.cost.lanes import LANES, LaneName, Lanes
from fiddler.scheduler.layer import Layer, Wave
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

    def on_cpu(self, layer: Layer, loads: tuple[Load, ...]) -> RunExperts:
        """Queue loads of a layer on the CPU."""
        predicted_s = self._correction.costs.cpu_s(layer.index, [load.n_rows for load in loads])
        return self._start(RunExperts(self._number(), "cpu", layer, loads, (), predicted_s))

    def on_gpu(self, layer: Layer, loads: tuple[Load, ...], slots: tuple[int, ...]) -> RunExperts:
        """Queue loads of a layer on the GPU, each from its slot."""
        predicted_s = self._correction.costs.gpu_s(layer.index, [load.n_rows for load in loads])
        return self._start(RunExperts(self._number(), "gpu", layer, loads, slots, predicted_s))

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
        return self._start(RunDense(self._number(), event.wave, predicted_s, event.due))

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


Waiting = tuple[Layer, Load]


@dataclass(slots=True)
class _Copy:
    job: int
    reservation: Reservation
    waiting: list[Waiting] = field(default_factory=list)
    ordered: bool = False
    """Whether the GPU may be given what needs it."""
    used: bool = False
    """Whether it was, before it landed."""


class Copies:
    """Owner of every copy under way: the slot it goes into, and what will run once it has landed."""

    def __init__(self, cache: ExpertCache, jobs: Jobs) -> None:
        self._cache = cache
        self._jobs = jobs
        self._copies: dict[Key, _Copy] = {}
        self._by_job: dict[int, _Copy] = {}

    @property
    def waiting(self) -> list[Waiting]:
        """Every load that waits for a copy."""
        return [pair for copy in self._copies.values() for pair in copy.waiting]

    def start(self, reservation: Reservation, reason: Reason, *waiting: Waiting) -> CopyExpert:
        """Queue the copy that a slot was reserved for, and let loads wait for it."""
        job = self._jobs.copy(reservation, reason)
        copy = _Copy(job.job, reservation, list(waiting))
        self._copies[reservation.key] = self._by_job[job.job] = copy
        return job

    def ahead_s(self, key: Key) -> float | None:
        """Return the link's seconds, as it takes alone, until an expert has landed; `None` if it is not copied."""
        copy = self._copies.get(key)
        return None if copy is None else self._jobs.ahead_s(copy.job)

    def slot(self, key: Key) -> int:
        """Return the slot an expert is in, or on its way into."""
        slot = self._cache.slot(key)
        return self._copies[key].reservation.slot if slot is None else slot

    def wait(self, layer: Layer, load: Load) -> bool:
        """Let a load wait for a copy that is under way; whether it has to."""
        copy = self._copies[layer.index, load.expert]
        if not copy.ordered:
            copy.waiting.append((layer, load))
        copy.used |= copy.ordered
        return not copy.ordered

    def order(self, job: int) -> list[Waiting]:
        """Let nothing wait for a copy any more; returns what did."""
        copy = self._by_job.get(job)
        if copy is None:
            return []
        waiting, copy.waiting = copy.waiting, []
        copy.ordered, copy.used = True, bool(waiting)
        return waiting

    def end(self, key: Key, landed: Callable[[Key], None], *, failed: bool) -> list[Waiting]:
        """Make a copy's slot READY and say so, or free if it failed; returns what waited for it."""
        copy = self._copies.pop(key)
        del self._by_job[copy.job]
        (self._cache.failed if failed else self._cache.landed)(copy.reservation)
        if not failed:
            landed(key)
            if copy.used:  # by who had no lease, and a slot in passing is judged as one ends
                self._cache.lease(key)
                self._cache.release(key)
        return copy.waiting

    def drop(self, wave: Wave) -> None:
        """Let go of a wave's loads; a copy that was started lands all the same."""
        for copy in self._copies.values():
            copy.waiting = [(layer, load) for layer, load in copy.waiting if layer.wave is not wave]

    def check(self) -> None:
        """Raise `AssertionError` unless every copy has one job and its slot."""
        jobs = {job.job: (job.layer, job.expert) for job in self._jobs.all if isinstance(job, CopyExpert)}
        assert jobs == {copy.job: key for key, copy in self._copies.items()}, "copies and their jobs differ"
        assert self._by_job == {copy.job: copy for copy in self._copies.values()}, "a copy is lost, by its job"
        for key, copy in self._copies.items():
            assert self._cache.loading(key) == copy.reservation, "a copy is under way into no slot"
