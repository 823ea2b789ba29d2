"""Corrects the cost model while it is used, by comparing the lanes' reports with predictions."""

from dataclasses import replace

from fiddler.cost.lanes import LaneName
from fiddler.cost.model import CostModel, ExpertCosts

WEIGHT = 0.05
"""Weight of one report: about twenty reports decide, so one interrupted job changes little."""
TOLERANCE = 0.05
"""The model is rebuilt only where a factor moved by more; a plan sees no difference below."""
LIMITS = 0.2, 5.0
"""A report outside these limits comes from a machine that slept, and is ignored."""


class Correction:
    """Owner of the cost model in use: the calibrated one with a factor a lane."""

    def __init__(self, calibrated: CostModel) -> None:
        self._calibrated = calibrated
        self._shapes = list(dict.fromkeys(calibrated.experts))
        self._which = [self._shapes.index(expert) for expert in calibrated.experts]
        self._factors: dict[LaneName, float] = {"cpu": 1.0, "gpu": 1.0, "link": 1.0}
        self._applied = dict(self._factors)
        self.costs = calibrated
        """The model to plan with."""

    @property
    def factors(self) -> dict[LaneName, float]:
        """Recent times as multiples of the calibrated ones, by lane."""
        return dict(self._factors)

    def report(self, lane: LaneName, predicted_s: float, took_s: float) -> None:
        """Take in the time of an expert job or a copy; `costs` made its prediction, including contention.

        Reports of a lane without calibration are ignored, since nothing is predicted for it.
        """
        if not (predicted_s > 0.0 and took_s >= 0.0):
            return
        ratio, applied, factor = took_s / predicted_s, self._applied[lane], self._factors[lane]
        if not LIMITS[0] <= ratio <= LIMITS[1]:
            ratio = LIMITS[0] if ratio < LIMITS[0] else LIMITS[1]
        factor += WEIGHT * (ratio * applied - factor)
        self._factors[lane] = factor
        if not -TOLERANCE <= factor / applied - 1.0 <= TOLERANCE:
            self._applied = dict(self._factors)
            self.costs = replace(self._calibrated, experts=self._corrected())

    def _corrected(self) -> tuple[ExpertCosts, ...]:
        by = self._applied
        made = [
            ExpertCosts(e.cpu.scaled(by["cpu"]), e.gpu.scaled(by["gpu"]), e.copy_s * by["link"], e.nbytes)
            for e in self._shapes
        ]
        return tuple([made[i] for i in self._which])
