"""Lanes that leave the experts out, so that what is left of a step is its dense part and the host's own work."""

from collections import deque
from collections.abc import Coroutine
from time import perf_counter
from typing import Any, TypeVar

from fiddler.devices.gpu import Event
from fiddler.lanes.gpu_crossing import GpuCrossing
from fiddler.lanes.watch import Watch
from fiddler.scheduler.messages import Job, JobDone, Report, RunDense

T = TypeVar("T")


class DenseLanes:
    """Lanes of a GPU that run no expert: their rows stay zero."""

    timed_dense = True

    def __init__(self, crossing: GpuCrossing, watch: Watch) -> None:
        self._crossing = crossing
        self._watch = watch
        self._reports: deque[Report] = deque()
        self._began: Event | None = None
        self.taken: list[float] = []
        """By dense part of the step under way, its seconds on the GPU."""

    def begin(self, began: Event) -> None:
        """Begin a step: its first dense part has no mark of its own."""
        self._began = began
        self.taken = []

    def now_s(self) -> float:
        """Return the wall clock's seconds."""
        return perf_counter()

    def start(self, job: Job) -> None:
        """Be through with a job, unless it is the dense part: that is reported when the GPU has passed it."""
        if isinstance(job, RunDense):
            self._await_dense(job)
        else:
            self._reports.append(JobDone(job.job, None))

    async def report(self) -> Report:
        """Ask until there is a report; it never gives way to the event loop."""
        while not self._reports:
            self._reports += self._watch.collect()
        return self._reports.popleft()

    def drain(self) -> list[Report]:
        """Return the reports that are there."""
        drained = [*self._reports, *self._watch.collect()]
        self._reports.clear()
        return drained

    async def aclose(self) -> None:
        """Nothing is left to end."""

    def _await_dense(self, job: RunDense) -> None:
        due = self._crossing.due[job.wave]
        began = due.began if due.began is not None else self._began
        assert began is not None

        def done() -> Report:
            self.taken.append(due.ended.since(began))
            return JobDone(job.job, None)

        self._watch.down(due.there, done)


def at_once(step: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never gives way, such as a step with `DenseLanes`. Raises `RuntimeError` for another."""
    try:
        step.send(None)
    except StopIteration as ended:
        value: T = ended.value
        return value
    raise RuntimeError("a step waits for an event loop")
