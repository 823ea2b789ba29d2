"""One layer of one wave on its way: what still has to run, and what it holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fiddler.scheduler.plan import Plan
from fiddler.scheduler.routing import LayerWork, Load


@dataclass(slots=True, eq=False)
class LayerRun:
    """The state of a layer between its `LayerReady` and its last load; the scheduler is its only writer."""

    wave: int
    work: LayerWork
    started_s: float
    pending: set[Load]
    """Immediate loads that have not run."""
    late: set[Load]
    """Deferred loads that have not run; the next layer waits for them."""
    leased: list[int] = field(default_factory=list)
    """Experts whose slots stay while the layer runs."""
    failures: dict[int, Exception] = field(default_factory=dict)
    plan: Plan | None = None
    before: "LayerRun | None" = None
    """The layer before, while its deferred loads run."""
    reported: bool = False
    """Whether its `LayerDone` was given."""

    @property
    def layer(self) -> int:
        """Which layer of the model."""
        return self.work.layer

    @property
    def complete(self) -> bool:
        """Whether nothing of it runs any more."""
        return not self.pending and not self.late

    @property
    def passable(self) -> bool:
        """Whether the forward can go on: its immediate loads have run, and the deferred ones of the layer before."""
        return not self.pending and (self.before is None or self.before.complete)

    def drop(self, loads: Sequence[Load]) -> None:
        """Take loads off the list: they have run, or never will."""
        self.pending.difference_update(loads)
        self.late.difference_update(loads)
