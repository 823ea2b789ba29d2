"""What every set of lanes promises: a lane runs its jobs in order, and each is reported once.

A job that raises ends its lane: `LaneDied` is then the last report of it, and stands for every job of the lane that
was not reported before. The other lanes go on.

A job as the trace shows it.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from fiddler.scheduler.messages import CopyExpert, Failures, Job, Reason, Report, RunExperts
from fiddler.trace import Kind, Span

Execute = Callable[[Job], Failures]
"""Does a job's work, whole, in the calling thread; returns what failed by expert. To raise is to end the lane."""


class LaneSet(Protocol):
    """The lanes of one machine. Its methods belong to the engine's thread."""

    timed_dense: bool
    """Whether the dense part's time must be asked for: the clock does not run by itself."""

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
        """End the lanes, once what they run is done."""
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
