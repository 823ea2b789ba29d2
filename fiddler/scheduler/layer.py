"""`Wave` and `Layer`: the state of rows in flight, made where a layer's routing arrives.

A `Layer` travels in events, jobs and reports and holds all that is known of it, so there are no tables by wave.
The scheduler writes the fields that it decides by; `tensors` belong to the lanes, and the scheduler does not look
at them. `Counters` counts what was decided for layers, and compares predicted with measured times.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fiddler.cache.policy import Rows
from fiddler.scheduler.routing import LayerWork, Load
from fiddler.trace import Decision, Trace

if TYPE_CHECKING:
    from fiddler.scheduler.guesses import NextLayer
    from fiddler.scheduler.plan import Plan

Came = tuple[LayerWork, int, int]
"""A layer's work, its number of tokens, and the experts that each token visits."""


class Wave:
    """Rows that travel through the model together, with the scheduler's notes on them."""

    def __init__(self) -> None:
        self.number = -1
        """Number of the wave, in the order in which waves began."""
        self.latest: Layer | None = None
        """The latest layer that it has reached."""
        self.coming: NextLayer | None = None
        """Guesses for its next layer."""
        self.passed_s: float | None = None
        """Seconds at which the latest layer's experts were done."""
        self.gone = False
        """Whether the wave was dropped."""


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
        """Number of the layer in the model."""
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
        """Worth of its experts in the cache before this visit, for policies that ask for it."""
        self.leased: Sequence[int] = ()
        """Experts whose slots are leased while the layer runs."""
        self.failures: dict[int, BaseException] = {}
        """Errors of immediate loads, by expert."""
        self.late_failures: dict[int, BaseException] = {}
        self.plan: Plan | None = None
        """The plan of the immediate loads."""
        self.before: Layer | None = None
        """The layer before, until this one is reported; only where it has deferred loads."""
        self.reported = False
        """Whether its `LayerDone` was sent."""
        self.unended = False
        """Whether the GPU was given some of its work without having finished it."""
        self.decision: Decision | None = None
        """The decision to compare with the measured time, once that is known."""

    @property
    def owed(self) -> set[Load]:
        """Loads that have not run."""
        return self.pending | self.late

    @property
    def complete(self) -> bool:
        """Whether no load of it is left to run."""
        return not self.pending and not self.late

    def ran(self, loads: Iterable[Load]) -> None:
        """Remove loads that have run or were dropped."""
        self.pending.difference_update(loads)
        if self.late:
            self.late.difference_update(loads)

    def fail(self, load: Load, error: BaseException) -> None:
        """Remove a load that failed for good."""
        failures = self.failures if load in self.pending else self.late_failures
        failures[load.expert] = error
        self.ran([load])

    def decided(self, now_s: float) -> Decision:
        """Return the decision, with the planned and the measured time."""
        plan = self.plan
        assert plan is not None
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


KEEP = 4096
"""Number of latest prediction errors that the median is taken of."""


@dataclass(slots=True)
class Counters:
    """Counts of layers and loads, and predicted beside measured times. The scheduler is its only writer."""

    trace: Trace | None = None
    n_layers: int = 0
    n_hits: int = 0
    """Loads sent to a slot that was READY or LOADING when the layer came."""
    n_cpu: int = 0
    n_fetches: int = 0
    n_promotions: int = 0
    n_fallbacks: int = 0
    """Loads that went to the CPU because their copy or the GPU failed."""
    _errors: deque[float] = field(default_factory=deque)
    _sorted: list[float] = field(default_factory=list)  # the same: statistics are asked for after every step

    def passed(self, layer: Layer, now_s: float) -> None:
        """Record a layer whose forward goes on; its time is measured now, or arrives later through `took`."""
        if layer.unended:
            layer.decision = layer.decided(now_s)
        elif self.trace is not None:
            self._keep(layer.decided(now_s))
        else:
            assert layer.plan is not None
            self._measured(layer.plan.predicted_s, now_s - layer.started_s)

    def took(self, layer: Layer, took_s: float) -> None:
        """Record a layer's time; nothing happens if it is known already or the wave was dropped."""
        decision, layer.decision = layer.decision, None
        if decision is not None and not layer.wave.gone:
            self._keep(replace(decision, measured_s=took_s))

    def median_error(self) -> float:
        """Return the median of `|predicted / measured - 1|` over the latest layers; 0.0 for none."""
        return self._sorted[len(self._sorted) // 2] if self._sorted else 0.0

    def _keep(self, decision: Decision) -> None:
        self._measured(decision.predicted_s, decision.measured_s)
        if self.trace is not None:
            self.trace.decision(decision)

    def _measured(self, predicted_s: float, measured_s: float) -> None:
        self.n_layers += 1
        if predicted_s > 0.0 and measured_s > 0.0:
            if len(self._errors) == KEEP:
                del self._sorted[bisect_left(self._sorted, self._errors.popleft())]
            error = abs(predicted_s / measured_s - 1.0)
            self._errors.append(error)
            insort(self._sorted, error)
