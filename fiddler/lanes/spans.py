"""A job as the trace shows it."""

from collections.abc import Mapping

from fiddler.scheduler.messages import CopyExpert, Job, Reason, RunExperts
from fiddler.trace import Kind, Span

_WORDS: Mapping[Reason, Kind] = {"demand": "copy", "ahead": "ahead", "promotion": "promote"}


def span(job: Job, start_s: float, end_s: float) -> Span:
    """Return the span of a job that ran from `start_s` to `end_s`."""
    match job:
        case RunExperts():
            name = f"L{job.layer} {len(job.loads)} expert{'s' * (len(job.loads) > 1)}"
            return Span(job.lane, name, job.wave, job.layer, start_s, end_s, job.predicted_s)
        case CopyExpert():
            name = f"{_WORDS[job.reason]} L{job.layer} E{job.expert}"
            return Span(job.lane, name, None, job.layer, start_s, end_s, job.predicted_s)
        case _:
            return Span(job.lane, "dense", job.wave, None, start_s, end_s, job.predicted_s)
