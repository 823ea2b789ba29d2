"""Lanes in wall time: a worker thread each, FIFO; what is urgent goes before what is not and has not started."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter

from fiddler.cost.lanes import LANES, LaneName
from fiddler.lanes.channel import Channel
from fiddler.lanes.laneset import Execute
from fiddler.lanes.spans import span
from fiddler.lanes.worker import Worker
from fiddler.scheduler.messages import Job, JobDone, LaneDied, Report
from fiddler.trace import Trace


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
        self._trace = trace
        self._reports: Channel[Report] = Channel()
        self._workers: dict[LaneName, Worker] = {}
        try:
            for lane in LANES:
                self._workers[lane] = Worker(lane, self._run, partial(self._bury, lane), working)
        except BaseException:
            self._end()
            raise

    def now_s(self) -> float:
        """Return the wall clock's seconds."""
        return perf_counter()

    def start(self, job: Job) -> None:
        """Queue a job for its lane's worker."""
        self._workers[job.lane].put(job)

    async def report(self) -> Report:
        """Wait for the next report."""
        return await self._reports.receive()

    def drain(self) -> list[Report]:
        """Return the reports that are there without waiting."""
        return self._reports.drain()

    async def aclose(self) -> None:
        """End the workers, once they are through with what is queued."""
        self._end()
        for worker in self._workers.values():
            await worker.join()
        self._workers.clear()  # they know these lanes: a cycle, and with it a store, would wait for the collector

    def _end(self) -> None:
        for worker in self._workers.values():
            worker.end()

    def _bury(self, lane: LaneName, error: BaseException) -> None:
        """Report what ended a worker early: the scheduler does without the lane then."""
        self._reports.push(LaneDied(lane, error))

    def _run(self, job: Job) -> None:
        started = perf_counter()
        failures = self._execute(job)
        ended = perf_counter()
        if self._trace is not None:
            self._trace.span(span(job, started, ended))
        self._reports.push(JobDone(job.job, ended - started, failures))
