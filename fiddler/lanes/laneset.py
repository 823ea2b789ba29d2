"""The interface of every set of lanes, and its simplest case: the CPU's lane in the engine's own thread.

A lane runs its jobs in order, and reports each once. A job that raises ends its lane. `LaneDied` is then the lane's
last report, and stands for all its jobs that were not reported before. The other lanes go on.
"""

from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Protocol

from fiddler.cost.model import LaneName
from fiddler.scheduler.messages import CopyExpert, Failures, Job, JobDone, LaneDied, Reason, Report, RunExperts
from fiddler.trace import Kind, Span, Trace

Execute = Callable[[Job], Failures]
"""Runs a whole job in the calling thread; returns failures by expert. Raising ends the lane."""


class LaneSet(Protocol):
    """The lanes of one machine. Its methods belong to the engine's thread."""

    timed_dense: bool
    """Whether the runner must queue the dense part as a job, so that the lane reports its end."""

    def now_s(self) -> float:
        """Return the seconds on this machine's clock."""
        ...

    def start(self, job: Job) -> None:
        """Queue a job in its lane; one that is urgent goes before those that are not and have not started."""
        ...

    def report(self) -> Report:
        """Wait for the next report. Call it only while a job is in flight, or it may wait for ever."""
        ...

    def drain(self) -> list[Report]:
        """Return the reports that are there without waiting."""
        ...

    def close(self) -> None:
        """End the lanes once their running jobs are done."""
        ...


_WORDS: Mapping[Reason, Kind] = {"demand": "copy", "ahead": "ahead", "promotion": "promote"}


def span(job: Job, start_s: float, end_s: float) -> Span:
    """Return the span of a job that ran from `start_s` to `end_s`."""
    match job:
        case RunExperts():
            name = f"L{job.layer.index} {len(job.loads)} expert{'s' * (len(job.loads) > 1)}"
            return Span(job.lane, name, job.layer.wave.number, job.layer.index, start_s, end_s, job.predicted_s)
        case CopyExpert():
            name = f"{_WORDS[job.reason]} L{job.layer} E{job.expert}"
            return Span(job.lane, name, None, job.layer, start_s, end_s, job.predicted_s)
        case _:
            return Span(job.lane, "dense", job.wave.number, None, start_s, end_s, job.predicted_s)


class InlineLanes:
    """The lane of a machine with only a CPU: runs every job at the moment it is started.

    A worker thread would have nothing to run beside, and its torch threads would compete with the engine's for the
    cores.
    """

    timed_dense = False

    def __init__(self, execute: Execute, trace: Trace | None = None) -> None:
        self._execute = execute
        self._trace = trace
        self._dead: set[LaneName] = set()
        self._reports: deque[Report] = deque()

    now_s = staticmethod(perf_counter)

    def start(self, job: Job) -> None:
        """Run a job."""
        if job.lane in self._dead:
            return
        started = perf_counter()
        try:
            failures = self._execute(job)
        except BaseException as error:
            self._dead.add(job.lane)
            self._reports.append(LaneDied(job.lane, error))
            return
        ended = perf_counter()
        if self._trace is not None:
            self._trace.span(span(job, started, ended))
        self._reports.append(JobDone(job.job, ended - started, failures))

    def report(self) -> Report:
        """Return the oldest report. Raises `RuntimeError` if there is none: no thread will bring one."""
        if not self._reports:
            raise RuntimeError("a report is waited for and no job is in flight")
        return self._reports.popleft()

    def drain(self) -> list[Report]:
        """Return the reports that are left."""
        if not self._reports:
            return []
        drained, self._reports = list(self._reports), deque()
        return drained

    def close(self) -> None:
        """Do nothing: there is no thread to end."""
