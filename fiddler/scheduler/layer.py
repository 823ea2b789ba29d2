"""A wave, and one layer of it on its way: made where its routing arrives, it travels in events, jobs and reports.

Everything that is known of them lies in these two objects, so nobody keeps a table by wave. The scheduler writes
what it needs to decide; `tensors` are the lanes' own, and the scheduler does not look at them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fiddler.cache.policy import Rows
from fiddler.scheduler.routing import LayerWork, Load
from fiddler.trace import Decision

if TYPE_CHECKING:
    from fiddler.scheduler.guesses import Forecast
    from fiddler.scheduler.plan import Plan

Came = tuple[LayerWork, int, int]
"""A layer as it came: its work, its tokens and the experts that each visits."""


class Wave:
    """Rows that travel through the model together, and what the scheduler keeps of them."""

    def __init__(self) -> None:
        self.number = -1
        """In the order in which waves were begun."""
        self.latest: Layer | None = None
        """The layer it has reached."""
        self.forecast: Forecast | None = None
        """What is expected of its next layer."""
        self.passed_s: float | None = None
        """When the latest layer's experts were done."""
        self.gone = False
        """Whether nobody waits for it any more."""


class Layer:
    """One layer of a wave, from its routing to its last load."""

    __slots__ = (
        "ahead",
        "before",
        "decision",
        "failures",
        "index",
        "late",
        "late_failures",
        "leased",
        "n_tokens",
        "pending",
        "plan",
        "reported",
        "scores",
        "started_s",
        "tensors",
        "top_k",
        "unended",
        "wave",
        "work",
        "worth",
    )

    def __init__(
        self,
        wave: Wave,
        work: LayerWork,
        n_tokens: int,
        top_k: int,
        *,
        scores: Sequence[float] | None = None,
        ahead: Rows = (),
        tensors: Any = None,
    ) -> None:
        self.wave = wave
        self.work = work
        self.index = work.layer
        """Which layer of the model."""
        self.n_tokens = n_tokens
        self.top_k = top_k
        self.scores = scores
        """Router probability by expert, summed over the tokens, where a policy wants it."""
        self.ahead = ahead
        """(expert, n_rows) that a look-ahead expects in the next layer, likeliest first."""
        self.tensors = tensors
        """Rows and results, as the lanes keep them."""
        self.started_s = 0.0
        self.pending = set(work.loads)
        """Immediate loads that have not run."""
        self.late = set(work.deferred)
        """Deferred loads that have not run; the next layer waits for them."""
        self.worth: Mapping[int, float] = {}
        """What the cache held its experts to be worth before this visit, where that is asked for."""
        self.leased: Sequence[int] = ()
        """Experts whose slots stay while the layer runs."""
        self.failures: dict[int, BaseException] = {}
        """Of immediate loads."""
        self.late_failures: dict[int, BaseException] = {}
        self.plan: Plan | None = None
        """Of the immediate loads."""
        self.before: Layer | None = None
        """The layer before, until this one is reported; only where it has deferred loads."""
        self.reported = False
        """Whether its `LayerDone` was given."""
        self.unended = False
        """Whether something of it was done before it had ended."""
        self.decision: Decision | None = None
        """What its prediction is held against, once it has ended."""

    @property
    def owed(self) -> set[Load]:
        """Loads that have not run."""
        return self.pending | self.late

    @property
    def complete(self) -> bool:
        """Whether nothing of it runs any more."""
        return not self.pending and not self.late

    def ran(self, loads: Iterable[Load]) -> None:
        """Take loads off the list: they have run, or nobody wants them any more."""
        self.pending.difference_update(loads)
        if self.late:
            self.late.difference_update(loads)

    def fail(self, load: Load, error: BaseException) -> None:
        """Take a load off the list that will never run."""
        failures = self.failures if load in self.pending else self.late_failures
        failures[load.expert] = error
        self.ran([load])

    def decided(self, plan: "Plan", now_s: float) -> Decision:
        """Return how it was planned and how long it has taken."""
        return Decision(
            at_s=self.started_s,
            wave=self.wave.number,
            layer=self.index,
            n_rows=len(self.work.order),
            n_cpu=len(plan.cpu),
            n_gpu=len(plan.gpu),
            n_fetch=len(plan.fetch),
            predicted_s=plan.predicted_s,
            measured_s=now_s - self.started_s,
        )
