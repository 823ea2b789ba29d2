"""Lanes in wall time: one worker thread each, in order; urgent jobs go before others that have not started."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Generic, TypeVar

from fiddler.cost.model import LANES, LaneName
from fiddler.errors import EngineFailedError
from fiddler.lanes.laneset import Execute, span
from fiddler.lanes.queues import Mailbox
from fiddler.scheduler.messages import CopyExpert, Job, JobDone, LaneDied, Report
from fiddler.trace import Trace

T = TypeVar("T")


class Worker(Generic[T]):
    """Runs jobs in order; urgent jobs go before others that have not started.

    The thread enters `working` for its life, and calls `died` with the error that ends it early. Raises
    `EngineFailedError` where the machine has no thread left.
    """

    def __init__(
        self,
        name: str,
        do: Callable[[T], None],
        died: Callable[[BaseException], None],
        working: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._do = do
        self._died = died
        self._working = working
        self._urgent: deque[T] = deque()
        self._idle: deque[T] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()  # one for each job, and a last one that says it is over
        self._thread = Thread(target=self._work, name=f"fiddler-{name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise EngineFailedError(f"a thread could not be started: {error}") from error

    def put(self, job: T, *, urgent: bool = True) -> None:
        """Queue a job."""
        (self._urgent if urgent else self._idle).append(job)
        self._calls.put(True)

    def end(self) -> None:
        """Let it end once its queue is empty."""
        self._calls.put(False)

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()

    def _work(self) -> None:
        try:
            with self._working():
                while self._calls.get():
                    self._do(self._urgent.popleft() if self._urgent else self._idle.popleft())
        except BaseException as error:
            self._died(error)


class ThreadLanes:
    """Three workers beside the engine's thread; a job crosses between threads once each way."""

    timed_dense = False

    def __init__(
        self,
        execute: Execute,
        *,
        working: Callable[[], AbstractContextManager[None]] = nullcontext,
        trace: Trace | None = None,
    ) -> None:
        """Each worker enters `working` for its life."""
        self._execute = execute
        self._trace = trace
        self._reports: Mailbox[Report] = Mailbox()
        self._workers: dict[LaneName, Worker[Job]] = {}
        try:
            for lane in LANES:
                self._workers[lane] = Worker(lane, self._run, partial(self._bury, lane), working)
        except BaseException:
            self._end()
            raise

    now_s = staticmethod(perf_counter)

    def start(self, job: Job) -> None:
        """Queue a job for its lane's worker."""
        urgent = not isinstance(job, CopyExpert) or job.urgent
        self._workers[job.lane].put(job, urgent=urgent)

    def report(self) -> Report:
        """Wait for the next report."""
        return self._reports.receive()

    def drain(self) -> list[Report]:
        """Return the reports that are there without waiting."""
        return self._reports.drain()

    def close(self) -> None:
        """End the workers once their queues are empty."""
        self._end()
        for worker in self._workers.values():
            worker.join()
        self._workers.clear()  # they know these lanes: a cycle, and with it a store, would wait for the collector

    def _end(self) -> None:
        for worker in self._workers.values():
            worker.end()

    def _bury(self, lane: LaneName, error: BaseException) -> None:
        """Report the error that ended a worker; the scheduler goes on without the lane."""
        self._reports.push(LaneDied(lane, error))

    def _run(self, job: Job) -> None:
        started = perf_counter()
        failures = self._execute(job)
        ended = perf_counter()
        if self._trace is not None:
            self._trace.span(span(job, started, ended))
        self._reports.push(JobDone(job.job, ended - started, failures))
