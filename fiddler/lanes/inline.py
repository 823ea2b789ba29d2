"""The lane of a machine with only a CPU, in the engine's own thread.

A worker thread would have nothing to run beside, and its torch threads would compete with the engine's for the
cores.
"""

from collections import deque
from time import perf_counter

from fiddler.cost.model import LaneName
from fiddler.lanes.laneset import Execute, span
from fiddler.scheduler.messages import Job, JobDone, LaneDied, Report
from fiddler.trace import Trace


class InlineLanes:
    """Runs every job at the moment it is started."""

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
