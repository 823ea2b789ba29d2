"""The timeline of a run: spans of the lanes, and every decision with its predicted and measured time.

Parts that record are given a `Trace`; without one they record nothing and pay nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["dense", "slots", "cpu", "copy", "ahead", "promote"]
"""Kinds of jobs: the dense part, experts from slots, experts on the CPU, and three copies: one that a layer waits
for, one that a next layer may want, and one of an expert that is visited often."""
_NOT_DEMANDED: tuple[Kind, ...] = ("ahead", "promote")


@dataclass(frozen=True, slots=True)
class Span:
    """One job of a lane. Times are seconds on the machine's clock."""

    lane: str
    name: str
    wave: int | None
    layer: int | None
    start_s: float
    end_s: float
    predicted_s: float
    """Predicted seconds, with the machine to itself."""

    @property
    def kind(self) -> Kind:
        """Kind of the job, by its lane and by the first word of its name."""
        if self.lane == "cpu":
            return "cpu"
        if self.lane == "gpu":
            return "dense" if self.layer is None else "slots"
        return next((kind for kind in _NOT_DEMANDED if self.name.startswith(kind)), "copy")


@dataclass(frozen=True, slots=True)
class Decision:
    """A layer's plan for one wave, with predicted and measured time."""

    at_s: float
    wave: int
    layer: int
    n_rows: int
    n_cpu: int
    n_gpu: int
    n_fetch: int
    predicted_s: float
    measured_s: float


@dataclass(slots=True)
class Trace:
    """The record of a run, at most `limit` spans and as many decisions: the earliest are kept."""

    limit: int = 1_000_000
    spans: list[Span] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def span(self, span: Span) -> None:
        """Record a job."""
        if len(self.spans) < self.limit:
            self.spans.append(span)

    def decision(self, decision: Decision) -> None:
        """Record a plan, once its layer is done."""
        if len(self.decisions) < self.limit:
            self.decisions.append(decision)

    def chrome(self, about: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the run in the Trace Event Format, which Perfetto and Chrome's tracing page open.

        `about` is kept beside the events. Source: "Trace Event Format", Google, 2016; times in microseconds.
        """
        spans = list(self.spans)  # lanes may still be adding to them
        lanes = sorted({span.lane for span in spans})
        events = [*_names(lanes), *self._events(spans, lanes)]
        return {"displayTimeUnit": "ms", "otherData": dict(about or {}), "traceEvents": events}

    def _events(self, spans: Sequence[Span], lanes: list[str]) -> Iterator[dict[str, Any]]:
        for span in spans:
            arguments = {"wave": span.wave, "layer": span.layer, "predicted_us": span.predicted_s * 1e6}
            yield {
                "name": span.name,
                "cat": span.kind,
                "ph": "X",
                "pid": 1,
                "tid": lanes.index(span.lane) + 1,
                "ts": span.start_s * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
                "args": arguments,
            }
        for decision in self.decisions:
            yield {
                "name": f"plan of layer {decision.layer}",
                "cat": "plan",
                "ph": "i",
                "s": "p",
                "pid": 1,
                "tid": 0,
                "ts": decision.at_s * 1e6,
                "args": asdict(decision),
            }


def _names(lanes: list[str]) -> Iterator[dict[str, Any]]:
    """Name the rows of the picture."""
    yield {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "fiddler"}}
    for i, row in enumerate(["plans", *lanes]):
        yield {"name": "thread_name", "ph": "M", "pid": 1, "tid": i, "args": {"name": row}}
