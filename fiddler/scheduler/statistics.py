"""Counts the scheduler's decisions, and compares predicted with measured layer times."""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field, replace

from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import LayerTook
from fiddler.trace import Decision, Trace

KEEP = 4096
"""Number of latest prediction errors that the median is taken of."""


@dataclass(slots=True)
class Counters:
    """The scheduler is its only writer."""

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

    def measured(self, predicted_s: float, measured_s: float) -> None:
        """Record a layer's predicted and measured time."""
        self.n_layers += 1
        if predicted_s > 0.0 and measured_s > 0.0:
            if len(self._errors) == KEEP:
                del self._sorted[bisect_left(self._sorted, self._errors.popleft())]
            error = abs(predicted_s / measured_s - 1.0)
            self._errors.append(error)
            insort(self._sorted, error)

    def median_error(self) -> float:
        """Return the median of `|predicted / measured - 1|` over the latest layers; 0.0 for none."""
        return self._sorted[len(self._sorted) // 2] if self._sorted else 0.0


class LayerRecords:
    """Compares each layer's prediction with its measured time."""

    def __init__(self, counters: Counters, trace: Trace | None) -> None:
        self._counters = counters
        self._trace = trace

    def passed(self, layer: Layer, now_s: float) -> None:
        """Record a layer whose forward goes on; its time is measured now, or arrives later through `took`."""
        assert layer.plan is not None
        if layer.unended:
            layer.decision = layer.decided(layer.plan, now_s)
        elif self._trace is not None:
            self._keep(layer.decided(layer.plan, now_s))
        else:
            self._counters.measured(layer.plan.predicted_s, now_s - layer.started_s)

    def took(self, event: LayerTook) -> None:
        """Record a layer's time; nothing happens if it is known already or the wave was dropped."""
        decision, event.layer.decision = event.layer.decision, None
        if decision is not None and not event.layer.wave.gone:
            self._keep(replace(decision, measured_s=event.took_s))

    def _keep(self, decision: Decision) -> None:
        self._counters.measured(decision.predicted_s, decision.measured_s)
        if self._trace is not None:
            self._trace.decision(decision)
