"""The scheduler's events and commands. All times are seconds on one clock.

LayerReady ──► RunExperts, CopyExpert … ──► JobDone … ──► LayerDone
DenseQueued ─► RunDense ───────────────────► JobDone ────► DenseDone

A GPU keeps the order in which it is given work, so the engine does not wait for the end of it: `CopyOrdered` comes
before a copy's `JobDone`, and experts are done once they are queued. Their times follow: `JobTook`, `LayerTook`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fiddler.cost.model import LaneName
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.routing import Load

Reason = Literal["demand", "ahead", "promotion"]
"""Why an expert is copied in: a layer waits for it, or a next one may want it, or it is visited often."""
Failures = Mapping[int, BaseException]
"""Errors by expert."""


@dataclass(frozen=True, slots=True)
class LayerReady:
    """A wave's forward waits for the experts of a layer."""

    layer: Layer


@dataclass(frozen=True, slots=True)
class DenseQueued:
    """A wave's next dense part begins, on a machine whose lanes report its end."""

    wave: Wave
    n_rows: int
    n_context: int
    """Tokens of past, over all sequences."""
    head: bool = False
    """Whether this is the output head, after the last layer."""
    due: object = None
    """A handle by which the GPU's lane knows when the dense part has ended."""


@dataclass(frozen=True, slots=True)
class JobDone:
    """A lane has finished a job, or failed in it."""

    job: int
    took_s: float | None
    """`None` if the job is only queued so far, and later work of the lane runs behind it."""
    failures: Failures = field(default_factory=dict)
    """Errors by expert; the job's other experts did run, or land."""


@dataclass(frozen=True, slots=True)
class CopyOrdered:
    """The GPU runs its further work behind a copy that has not landed yet."""

    job: int


@dataclass(frozen=True, slots=True)
class JobTook:
    """The seconds of a job that was reported done before it ended; `predicted_s` is without contention."""

    lane: LaneName
    predicted_s: float
    took_s: float


@dataclass(frozen=True, slots=True)
class LayerTook:
    """The experts of a wave's layer have ended, `took_s` seconds after the layer was ready."""

    layer: Layer
    took_s: float


@dataclass(frozen=True, slots=True)
class LaneDied:
    """A lane has ended; its queued jobs will not run."""

    lane: LaneName
    error: BaseException


@dataclass(frozen=True, slots=True)
class WaveDropped:
    """A wave was given up."""

    wave: Wave


Report = JobDone | CopyOrdered | JobTook | LayerTook | LaneDied
"""Events that lanes send."""
Event = LayerReady | DenseQueued | Report | WaveDropped


@dataclass(frozen=True, slots=True)
class RunExperts:
    """Run loads of a wave's layer, from slots on the GPU or from their blocks on the CPU."""

    job: int
    lane: LaneName
    layer: Layer
    loads: tuple[Load, ...]
    slots: tuple[int, ...]
    """Slots of the loads on the GPU; empty on the CPU."""
    predicted_s: float


@dataclass(frozen=True, slots=True)
class CopyExpert:
    """Copy an expert's block into a slot."""

    job: int
    layer: int
    expert: int
    slot: int
    reason: Reason
    predicted_s: float
    lane: LaneName = "link"

    @property
    def urgent(self) -> bool:
        """Whether a layer waits for it; urgent copies go before others."""
        return self.reason == "demand"


@dataclass(frozen=True, slots=True)
class RunDense:
    """Run a wave's dense part on the GPU's lane, or account for its time."""

    job: int
    wave: Wave
    predicted_s: float
    due: object = None
    lane: LaneName = "gpu"


@dataclass(frozen=True, slots=True)
class LayerDone:
    """A layer's experts have run, except those in `failures`, which will not run any more."""

    layer: Layer
    failures: Failures
    late_failures: Failures
    """Errors of the deferred loads of the layer before."""


@dataclass(frozen=True, slots=True)
class DenseDone:
    """A wave's dense part has ended."""

    wave: Wave


Job = RunExperts | CopyExpert | RunDense
Command = Job | LayerDone | DenseDone
