"""Owns the jobs that lanes have not reported yet, and the copies under way.

`Jobs` predicts each job's seconds, keeps the lanes' queues, and knows which lanes are dead. `Copies` knows the slot
of each copy and the loads that wait for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cache.slots import Reservation
from fiddler.cost.lanes import Lanes
from fiddler.cost.model import LANES, Correction, LaneName
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.messages import CopyExpert, DenseQueued, Failures, Job, Reason, RunDense, RunExperts
from fiddler.scheduler.routing import Load

J = TypeVar("J", RunExperts, CopyExpert, RunDense)


class Jobs:
    """Makes jobs with their predicted seconds, and owns all jobs that were not reported yet."""

    def __init__(self, correction: Correction) -> None:
        self.dead: dict[LaneName, BaseException] = {}
        """Lanes that died, and the error of each."""
        self.correction = correction
        self._jobs: dict[int, Job] = {}
        self._n_made = 0
        self.lanes = Lanes(correction.costs.contention)
        """What is queued where, as far as the predictions are true."""

    def __bool__(self) -> bool:
        return bool(self._jobs)

    @property
    def all(self) -> list[Job]:
        """Every job, the oldest first."""
        return list(self._jobs.values())

    def run(
        self, lane: Literal["cpu", "gpu"], layer: Layer, loads: tuple[Load, ...], slots: tuple[int, ...] = ()
    ) -> RunExperts:
        """Queue loads of a layer on the CPU, or on the GPU, each from its slot."""
        rows = []
        for load in loads:
            rows.append(load.n_rows)  # no call of its own, here and in all that runs for every layer
        costs = self.correction.costs
        predicted_s = costs.cpu_s(layer.index, rows) if lane == "cpu" else costs.gpu_s(layer.index, rows)
        return self._start(lane, RunExperts(self._n_made, lane, layer, loads, slots, predicted_s))

    def copy(self, reservation: Reservation, reason: Reason) -> CopyExpert:
        """Queue the copy that a slot was reserved for."""
        layer, expert = reservation.key
        copy_s = self.correction.costs.experts[layer].copy_s
        job = CopyExpert(self._n_made, layer, expert, reservation.slot, reason, copy_s)
        return self._start("link", job, urgent=reason == "demand")

    def dense(self, event: DenseQueued) -> RunDense:
        """Queue a wave's dense part."""
        costs = self.correction.costs
        if event.head:
            predicted_s = costs.dense.head(event.n_rows)
        else:
            predicted_s = costs.dense.layer_s(event.n_rows, event.n_context) + costs.host_s
        return self._start("gpu", RunDense(self._n_made, event.wave, predicted_s, event.due))

    def end(self, number: int) -> tuple[Job, float] | None:
        """Remove a job; returns it with its predicted seconds, contention included.

        Returns `None` if it is not known: its lane was declared dead before it reported.
        """
        job = self._jobs.pop(number, None)
        if job is None:
            return None
        predicted_s = self.lanes.remove(job.lane, number)
        assert predicted_s is not None, "a job was in no lane's queue"
        return job, predicted_s

    def check(self) -> None:
        """Raise `AssertionError` unless the lanes' queues hold these jobs and dead lanes none."""
        for lane in LANES:
            queued = {queued.job for queued in self.lanes.queues[lane]}
            assert queued == {job.job for job in self.all if job.lane == lane}, f"the {lane} lane's jobs are others"
            assert not queued or lane not in self.dead, f"the {lane} lane is dead and has jobs"

    def _start(self, lane: LaneName, job: J, *, urgent: bool = True) -> J:
        self._jobs[job.job] = job
        self._n_made += 1
        self.lanes.put(lane, job.job, job.predicted_s, urgent=urgent)
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
class Copy:
    """One under way."""

    job: int
    reservation: Reservation
    reason: Reason
    waiting: list[Waiting] = field(default_factory=list)
    ordered: bool = False
    """Whether the GPU may be given what needs it."""
    used: bool = False
    """Whether it was, before it landed."""


class Copies:
    """Owner of every copy under way: its slot, and the loads that run once it has landed."""

    def __init__(self, cache: ExpertCache, jobs: Jobs) -> None:
        self._cache = cache
        self._jobs = jobs
        self.by_expert: dict[Key, Copy] = {}
        """All of them; `by_job` has the same."""
        self.by_job: dict[int, Copy] = {}

    @property
    def waiting(self) -> list[Waiting]:
        """Every load that waits for a copy."""
        return [pair for copy in self.by_expert.values() for pair in copy.waiting]

    def start(self, reservation: Reservation, reason: Reason, *waiting: Waiting) -> CopyExpert:
        """Queue the copy that a slot was reserved for, and let loads wait for it."""
        job = self._jobs.copy(reservation, reason)
        copy = Copy(job.job, reservation, reason, list(waiting))
        self.by_expert[reservation.key] = self.by_job[job.job] = copy
        return job

    def slots(self, layer: int, loads: Sequence[Load]) -> tuple[int, ...]:
        """Return the slots that a layer's loads are in, or on their way into."""
        found = []
        for load in loads:
            key = layer, load.expert
            slot = self._cache.ready.get(key)
            found.append(self.by_expert[key].reservation.slot if slot is None else slot)
        return tuple(found)

    def wait(self, layer: Layer, load: Load) -> bool:
        """Let a load wait for a copy that is under way; returns whether there is one."""
        copy = self.by_expert[layer.index, load.expert]
        if not copy.ordered:
            copy.waiting.append((layer, load))
        copy.used |= copy.ordered
        return not copy.ordered

    def order(self, job: int) -> list[Waiting]:
        """Mark a copy as ordered on the GPU; returns the loads that waited for it."""
        copy = self.by_job.get(job)
        if copy is None:
            return []
        waiting, copy.waiting = copy.waiting, []
        copy.ordered, copy.used = True, bool(waiting)
        return waiting

    def end(self, key: Key, landed: Callable[[Key], None], *, failed: bool) -> list[Waiting]:
        """End a copy: its slot becomes READY, or free if it failed. Returns the loads that waited for it."""
        copy = self.by_expert.pop(key)
        del self.by_job[copy.job]
        (self._cache.failed if failed else self._cache.landed)(copy.reservation)
        if not failed:
            landed(key)
            if copy.used:  # by who had no lease, and a slot in passing is judged as one ends
                self._cache.lease(key)
                self._cache.release(key)
        return copy.waiting

    def drop(self, wave: Wave) -> None:
        """Drop a wave's waiting loads; a copy that was started still lands."""
        for copy in self.by_expert.values():
            copy.waiting = [(layer, load) for layer, load in copy.waiting if layer.wave is not wave]

    def check(self) -> None:
        """Raise `AssertionError` unless every copy has one job and its slot."""
        jobs = {job.job: (job.layer, job.expert) for job in self._jobs.all if isinstance(job, CopyExpert)}
        assert jobs == {copy.job: key for key, copy in self.by_expert.items()}, "copies and their jobs differ"
        assert self.by_job == {copy.job: copy for copy in self.by_expert.values()}, "a copy is lost, by its job"
        for key, copy in self.by_expert.items():
            assert self._cache.loading(key) == copy.reservation, "a copy is under way into no slot"
