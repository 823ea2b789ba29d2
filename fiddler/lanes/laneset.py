"""What every set of lanes promises: jobs are started in order, and each is reported once."""

from collections.abc import Callable
from typing import Protocol

from fiddler.scheduler.messages import Failures, Job, JobDone, LaneDied

Execute = Callable[[Job], Failures]
"""Does a job's work, whole, in the calling thread; returns what failed by expert."""


class LaneSet(Protocol):
    """The lanes of one machine. Its methods belong to the engine's thread."""

    timed_dense: bool
    """Whether the dense part's time must be asked for: the clock does not run by itself."""

    def now_s(self) -> float:
        """Return the seconds on this machine's clock."""
        ...

    def start(self, job: Job) -> None:
        """Queue a job in its lane."""
        ...

    async def report(self) -> JobDone | LaneDied:
        """Wait for the next report. Call it only while a job is in flight, or it may wait for ever."""
        ...

    def drain(self) -> list[JobDone | LaneDied]:
        """Return the reports that are there without waiting."""
        ...

    async def aclose(self) -> None:
        """End the lanes, once what they run is done."""
        ...
