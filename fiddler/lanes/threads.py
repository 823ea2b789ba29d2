"""Lanes in wall time: a worker thread each, FIFO; what is urgent goes before what is not and has not started."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from queue import PriorityQueue
from threading import Thread
from time import perf_counter

from anyio import to_thread

from fiddler.cost.lanes import LANES, LaneName
from fiddler.lanes.channel import Channel
from fiddler.lanes.laneset import Execute
from fiddler.lanes.spans import span
from fiddler.scheduler.messages import CopyExpert, Job, JobDone, LaneDied, Report
from fiddler.trace import Trace


@dataclass(order=True, slots=True)
class _Queued:
    rank: int
    number: int
    job: Job | None = field(compare=False)


_URGENT, _IDLE, _END = range(3)


class ThreadLanes:
    """Three workers beside the engine's thread; one crossing per job each way."""

    timed_dense = False

    def __init__(
        self,
        execute: Execute,
        *,
        working: Callable[[], AbstractContextManager[None]] = nullcontext,
        trace: Trace | None = None,
    ) -> None:
        """`working` is entered in each worker, for its life."""
        self._execute = execute
        self._working = working
        self._trace = trace
        self._reports: Channel[Report] = Channel()
        self._numbers = count()
        self._queues: dict[LaneName, PriorityQueue[_Queued]] = {lane: PriorityQueue() for lane in LANES}
        self._threads = [
            Thread(target=self._work, args=(lane,), name=f"fiddler-{lane}", daemon=True) for lane in LANES
        ]
        for thread in self._threads:
            thread.start()

    def now_s(self) -> float:
        """Return the wall clock's seconds."""
        return perf_counter()

    def start(self, job: Job) -> None:
        """Queue a job for its lane's worker."""
        rank = _IDLE if isinstance(job, CopyExpert) and not job.urgent else _URGENT
        self._queues[job.lane].put(_Queued(rank, next(self._numbers), job))

    async def report(self) -> Report:
        """Wait for the next report."""
        return await self._reports.receive()

    def drain(self) -> list[Report]:
        """Return the reports that are there without waiting."""
        return self._reports.drain()

    async def aclose(self) -> None:
        """End the workers, once they are through with what is queued."""
        for queue in self._queues.values():
            queue.put(_Queued(_END, next(self._numbers), None))
        for thread in self._threads:
            await to_thread.run_sync(thread.join)

    def _work(self, lane: LaneName) -> None:
        """Be a lane's worker. Whatever ends it early is reported: the scheduler does without the lane then."""
        try:
            with self._working():
                while (job := self._queues[lane].get().job) is not None:
                    self._run(job)
        except BaseException as error:
            wrapped = error if isinstance(error, Exception) else RuntimeError(f"the {lane} lane ended: {error!r}")
            self._reports.push(LaneDied(lane, wrapped))

    def _run(self, job: Job) -> None:
        started = perf_counter()
        failures = self._execute(job)
        ended = perf_counter()
        if self._trace is not None:
            self._trace.span(span(job, started, ended))
        self._reports.push(JobDone(job.job, ended - started, failures))
