"""Lanes of a machine with a GPU: its streams, a worker for the host's experts, and one for copies of pageable
blocks.

A job counts as done once it is queued on a stream, because later work queues behind it. Its duration is reported
when the GPU finishes. Only the dense part counts as done when it has ended, because the host then reads its
routing.
"""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any, cast

import torch

from fiddler.cost.model import LaneName
from fiddler.gpu.crossing import Due
from fiddler.gpu.device import Event
from fiddler.gpu.jobs import Computed, GpuJobs
from fiddler.lanes.laneset import span
from fiddler.lanes.queues import Mailbox
from fiddler.lanes.threads import Worker
from fiddler.scheduler.messages import (
    CopyExpert,
    CopyOrdered,
    Failures,
    Job,
    JobDone,
    JobTook,
    LaneDied,
    Report,
    RunDense,
    RunExperts,
)
from fiddler.trace import Trace

logger = logging.getLogger("fiddler")

_Told = Callable[[], None]
"""A task that a worker leaves to the engine's thread."""


def _look() -> None:
    """Do nothing: the message only wakes the engine's thread, which then looks at the streams' points."""


class StreamLanes:
    """The lanes of one GPU and its host. Everything is queued from the engine's thread, but for staged copies."""

    timed_dense = True

    def __init__(
        self,
        jobs: GpuJobs,
        *,
        working: Callable[[], AbstractContextManager[None]] = nullcontext,
        trace: Trace | None = None,
    ) -> None:
        """Each worker enters `working` for its life."""
        self._jobs = jobs
        self._watch = jobs.watch
        self._trace = trace
        self._working: dict[int, LaneName] = {}  # jobs that workers have
        self._said: set[type[BaseException]] = set()
        self._reports: deque[Report] = deque()
        self._told: Mailbox[_Told] = Mailbox()
        self._anchor: tuple[Event, float] | None = None  # a point of the GPU's clock, and the same on the host's
        self._cpu = Worker[Job]("cpu", self._compute, partial(self._bury, "cpu"), working)
        self._link = Worker[Job]("link", self._stage, partial(self._bury, "link"), working)
        self._waiters = [Worker[Event](f"wait-{name}", self._await, self._lost) for name in ("link", "down")]

    now_s = staticmethod(perf_counter)

    def start(self, job: Job) -> None:
        """Queue a job on its stream, or for its worker."""
        match job:
            case RunDense():
                self._await_dense(job)
            case RunExperts(lane="cpu"):
                self._working[job.job] = "cpu"
                self._cpu.put(job)
            case RunExperts():
                self._launch(job)
            case CopyExpert():
                self._copy(job)

    def report(self) -> Report:
        """Wait for the next report."""
        self._collect()
        while not self._reports:
            self._wait()
            self._collect()
        return self._reports.popleft()

    def _wait(self) -> None:
        """Wait for a worker, or for a point of the GPU; in this thread if there is only one thing to wait for."""
        point = self._watch.alone()
        if point is not None and not self._working:
            point.wait()
            return
        for waiter, events in zip(self._waiters, self._watch.unawaited(), strict=True):
            for event in events:
                waiter.put(event)
        self._told.receive()()

    def drain(self) -> list[Report]:
        """Return the reports that are there without waiting."""
        self._collect()
        drained = list(self._reports)
        self._reports.clear()
        return drained

    def close(self) -> None:
        """End the workers, once they are through with what is queued."""
        workers: list[Worker[Any]] = [self._cpu, self._link, *self._waiters]
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.join()

    def _collect(self) -> None:
        for told in self._told.drain():
            told()
        self._reports += self._watch.collect()

    def _await_dense(self, job: RunDense) -> None:
        due = cast("Due", job.due)

        def done() -> Report:
            self._anchor = due.ended, perf_counter()
            if due.began is not None:
                self._note(job, due.began, due.ended)
            return JobDone(job.job, None if due.began is None else due.ended.since(due.began))

        self._watch.down(due.there, done)

    def _launch(self, job: RunExperts) -> None:
        try:
            queued = self._jobs.launch(job)
        except BaseException as error:
            self._reports.append(JobDone(job.job, None, self._failed(job, error)))
            return
        self._reports.append(JobDone(job.job, None))
        if queued is not None:
            self._watch.main(queued[1], lambda: self._took(job, *queued))

    def _took(self, job: RunExperts | CopyExpert, began: Event, ended: Event) -> Report:
        took_s = ended.since(began)
        self._jobs.counters[job.lane].busy_s += took_s
        self._note(job, began, ended)
        if isinstance(job, RunExperts):
            return JobTook(job.lane, job.predicted_s, took_s)
        self._jobs.landed(job, ended)
        return JobDone(job.job, took_s)

    def _copy(self, job: CopyExpert) -> None:
        if self._jobs.pageable(job):
            self._working[job.job] = "link"
            self._link.put(job, urgent=job.urgent)
        else:
            self._queue(job)()

    def _queue(self, job: CopyExpert) -> _Told:
        """Queue a copy; returns the engine's thread's part of the work."""
        try:
            began, landed = self._jobs.copy(job)
        except BaseException as error:
            failures = {job.expert: error}
            return lambda: self._reports.append(JobDone(job.job, 0.0, failures))
        return lambda: self._order(job, began, landed)

    def _order(self, job: CopyExpert, began: Event, landed: Event) -> None:
        self._jobs.order(job, landed)
        self._reports.append(CopyOrdered(job.job))
        self._watch.link(landed, lambda: self._took(job, began, landed))

    def _staged(self, job: CopyExpert, queued: _Told) -> None:
        self._working.pop(job.job, None)
        queued()

    # In the workers' threads

    def _await(self, event: Event) -> None:
        event.wait()
        self._told.push(_look)

    def _lost(self, error: BaseException) -> None:
        """Raise the error of a wait for the GPU in the engine's thread: nothing queued will end."""

        def fail() -> None:
            raise error

        self._told.push(fail)

    def _stage(self, job: Job) -> None:
        assert isinstance(job, CopyExpert)
        queued = self._queue(job)
        self._told.push(lambda: self._staged(job, queued))

    def _compute(self, job: Job) -> None:
        assert isinstance(job, RunExperts)
        started = perf_counter()
        computed = self._jobs.compute(job)
        ended = perf_counter()
        if self._trace is not None:
            self._trace.span(span(job, started, ended))
        self._told.push(lambda: self._computed(job, computed, ended - started))

    def _computed(self, job: RunExperts, computed: Computed | None, took_s: float) -> None:
        self._working.pop(job.job, None)
        failures: Failures = {}
        if computed is not None:
            try:
                self._jobs.land(computed)
                failures = computed.failures
            except BaseException as error:
                failures = self._failed(job, error)
        self._reports.append(JobDone(job.job, took_s, failures))

    def _failed(self, job: RunExperts, error: BaseException) -> Failures:
        """Log once why experts failed on the GPU; the CPU runs those it can."""
        self._jobs.short |= isinstance(error, torch.OutOfMemoryError)
        if type(error) not in self._said:
            self._said.add(type(error))
            logger.warning("experts on the GPU failed, and others may: %s: %s", type(error).__name__, error)
        return {load.expert: error for load in job.loads}

    def _bury(self, lane: LaneName, error: BaseException) -> None:
        self._told.push(lambda: self._buried(lane, error))

    def _buried(self, lane: LaneName, error: BaseException) -> None:
        self._working = {job: other for job, other in self._working.items() if other != lane}
        self._reports.append(LaneDied(lane, error))

    def _note(self, job: Job, began: Event, ended: Event) -> None:
        """Write a span down, on the host's clock."""
        if self._trace is not None:
            point, at_s = self._anchor = self._anchor or (ended, perf_counter())
            self._trace.span(span(job, at_s - point.since(began), at_s - point.since(ended)))
