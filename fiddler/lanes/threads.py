"""Lanes in wall time: a worker thread each, FIFO; what is urgent goes before what is not and has not started.

A thread that does the jobs of one lane.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import PriorityQueue
from threading import Thread
from time import perf_counter

from fiddler.cost.lanes import LANES, LaneName
from fiddler.errors import EngineFailedError
from fiddler.lanes.channel import Channel, Latch
from fiddler.lanes.laneset import Execute, span
from fiddler.scheduler.messages import CopyExpert, Job, JobDone, LaneDied, Report
from fiddler.trace import Trace


@dataclass(order=True, slots=True)
class _Queued:
    rank: int
    number: int
    job: Job | None = field(compare=False)


_URGENT, _IDLE, _END = range(3)


class Worker:
    """Does jobs in order; what is urgent goes before what is not and has not started.

    `working` is entered in the thread, for its life. `died` is told, there, of whatever ends it early. Raises
    `EngineFailedError` where the machine has no thread left.
    """

    def __init__(
        self,
        name: str,
        do: Callable[[Job], None],
        died: Callable[[BaseException], None],
        working: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._do = do
        self._died = died
        self._working = working
        self._numbers = count()
        self._queue: PriorityQueue[_Queued] = PriorityQueue()
        self._ended = Latch()
        self._thread = Thread(target=self._work, name=f"fiddler-{name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise EngineFailedError(f"a thread could not be started: {error}") from error

    def put(self, job: Job) -> None:
        """Queue a job."""
        rank = _IDLE if isinstance(job, CopyExpert) and not job.urgent else _URGENT
        self._queue.put(_Queued(rank, next(self._numbers), job))

    def end(self) -> None:
        """Let it end once it is through with what is queued."""
        self._queue.put(_Queued(_END, next(self._numbers), None))

    async def join(self) -> None:
        """Wait for its end."""
        await self._ended.wait()
        self._thread.join()  # its last steps take no time

    def _work(self) -> None:
        try:
            with self._working():
                while (job := self._queue.get().job) is not None:
                    self._do(job)
        except BaseException as error:
            self._died(error)
        finally:
            self._ended.set()


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
