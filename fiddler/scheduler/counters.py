"""What the scheduler has decided, in numbers."""

from dataclasses import dataclass, field

KEEP = 4096
"""Prediction errors kept for their median: the latest."""


@dataclass(slots=True)
class Counters:
    """The scheduler is its only writer."""

    n_layers: int = 0
    n_hits: int = 0
    """Loads run from a slot that was READY or LOADING when they came."""
    n_cpu: int = 0
    n_fetches: int = 0
    n_promotions: int = 0
    n_fallbacks: int = 0
    """Copies and GPU loads that failed and went to the CPU."""
    copied_bytes: int = 0
    predicted_s: float = 0.0
    measured_s: float = 0.0
    _errors: list[float] = field(default_factory=list)

    def planned(self, *, hits: int, cpu: int, fetches: int) -> None:
        """Take note of a plan's loads."""
        self.n_hits += hits
        self.n_cpu += cpu
        self.n_fetches += fetches

    def copied(self, nbytes: int) -> None:
        """Take note of a copy."""
        self.copied_bytes += nbytes

    def measured(self, predicted_s: float, measured_s: float) -> None:
        """Take note of a layer's predicted and measured time."""
        self.n_layers += 1
        self.predicted_s += predicted_s
        self.measured_s += measured_s
        if predicted_s > 0.0 and measured_s > 0.0:
            if len(self._errors) == KEEP:
                self._errors[self.n_layers % KEEP] = abs(predicted_s / measured_s - 1.0)
            else:
                self._errors.append(abs(predicted_s / measured_s - 1.0))

    def median_error(self) -> float:
        """Return the median of `|predicted / measured - 1|` over the latest layers; 0.0 for none."""
        errors = sorted(self._errors)
        return errors[len(errors) // 2] if errors else 0.0
