"""What the scheduler is told, and what it asks for. Times it is given are seconds on one clock.

LayerReady ──► RunExperts, CopyExpert … ──► JobDone … ──► LayerDone
DenseQueued ─► RunDense ───────────────────► JobDone ────► DenseDone

A GPU keeps the order in which it is given work, so nobody waits for the end of it: `CopyOrdered` comes before a
copy's `JobDone`, and experts are done once they are queued. What they took follows: `JobTook`, `LayerTook`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fiddler.cost.lanes import LaneName
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.routing import Load

Reason = Literal["demand", "ahead", "promotion"]
"""Why an expert is copied in: a layer waits for it, or a next one may want it, or it is visited often."""
Failures = Mapping[int, BaseException]
"""What went wrong, by expert."""


@dataclass(frozen=True, slots=True)
class LayerReady:
    """A wave's forward waits for the experts of a layer."""

    layer: Layer


@dataclass(frozen=True, slots=True)
class DenseQueued:
    """A wave goes on to its next layer's dense part, on a machine whose clock does not run by itself."""

    wave: Wave
    n_rows: int
    n_context: int
    """Tokens of past, over all sequences."""
    head: bool = False
    """Whether it is the output head, after the last layer."""
    due: object = None
    """What tells its lane when it has ended; for that lane alone."""


@dataclass(frozen=True, slots=True)
class JobDone:
    """A lane is through with a job, for good or ill."""

    job: int
    took_s: float | None
    """`None` where whatever the lane is given next comes after it, and it has not ended yet."""
    failures: Failures = field(default_factory=dict)
    """Experts that did not run or, of a copy, the one that did not land; the job's others did."""


@dataclass(frozen=True, slots=True)
class CopyOrdered:
    """What the GPU is given from now on comes after a copy that has not landed yet."""

    job: int


@dataclass(frozen=True, slots=True)
class JobTook:
    """A job has ended that was done before; what was predicted for it, with nothing else running."""

    lane: LaneName
    predicted_s: float
    took_s: float


@dataclass(frozen=True, slots=True)
class LayerTook:
    """The experts of a wave's layer have ended, so long after the layer was ready."""

    layer: Layer
    took_s: float


@dataclass(frozen=True, slots=True)
class LaneDied:
    """A lane will do nothing any more; what it had queued is not done."""

    lane: LaneName
    error: BaseException


@dataclass(frozen=True, slots=True)
class WaveDropped:
    """Nobody waits for a wave any more."""

    wave: Wave


Report = JobDone | CopyOrdered | JobTook | LayerTook | LaneDied
"""What lanes tell."""
Event = LayerReady | DenseQueued | Report | WaveDropped


@dataclass(frozen=True, slots=True)
class RunExperts:
    """Run loads of a wave's layer, from slots on the GPU or from their blocks on the CPU."""

    job: int
    lane: LaneName
    layer: Layer
    loads: tuple[Load, ...]
    slots: tuple[int, ...]
    """As many as loads on the GPU; none on the CPU."""
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
        """Whether a layer waits for it: it goes before copies that nobody waits for."""
        return self.reason == "demand"


@dataclass(frozen=True, slots=True)
class RunDense:
    """Let a wave's dense part take its time on the GPU."""

    job: int
    wave: Wave
    predicted_s: float
    due: object = None
    lane: LaneName = "gpu"


@dataclass(frozen=True, slots=True)
class LayerDone:
    """A layer's experts have run; those in `failures` have not, and nothing else will run them."""

    layer: Layer
    failures: Failures
    late_failures: Failures
    """Of the deferred loads of the layer before."""


@dataclass(frozen=True, slots=True)
class DenseDone:
    """A wave's dense part is through."""

    wave: Wave


Job = RunExperts | CopyExpert | RunDense
Command = Job | LayerDone | DenseDone
