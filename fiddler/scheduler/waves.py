"""One wave or two: whether halving a step's rows pays.

Two waves let one's experts run beside the other's dense part, but an expert that both halves visit is read twice.
So the cost model is asked, on the routing of the latest step, and what it says is corrected by what steps then took.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fiddler.cost.model import CostModel
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.messages import LayerReady
from fiddler.scheduler.plan import Backlog, Candidate, Plan, descent
from fiddler.scheduler.routing import Load

WaveMode = Literal["auto", "one", "two"]

MARGIN = 0.05
"""Two waves must be predicted to be faster by this share: the prediction is of a typical layer, not of this step."""
EVERY = 16
"""Steps between predictions while a step's rows stay the same number."""
N_LAYERS = 8
"""Layers that are predicted, spread over the model."""
WEIGHT = 0.2
"""Of the latest step in a bias."""


@dataclass(slots=True)
class Waves:
    """Decides for every step; owner of what it has learnt about its own predictions."""

    mode: WaveMode
    scheduler: Scheduler
    _bias: dict[int, float] = field(default_factory=lambda: {1: 1.0, 2: 1.0})
    _predicted: dict[int, float] = field(default_factory=dict)
    _for_rows: int = 0
    _age: int = 0

    def choose(self, n_rows: int, n_context: int) -> int:
        """Return how many waves a step of `n_rows` rows over `n_context` tokens of past should be: 1 or 2."""
        if self.mode != "auto" or n_rows < 2:
            return 2 if self.mode == "two" and n_rows >= 2 else 1
        if n_rows != self._for_rows or self._age >= EVERY:
            self._predicted = self._predict(n_rows, n_context)
            self._for_rows, self._age = n_rows, 0
        self._age += 1
        if not self._predicted:
            return 1
        one, two = (self._predicted[n] * self._bias[n] for n in (1, 2))
        return 2 if two < one * (1.0 - MARGIN) else 1

    def took(self, n_waves: int, seconds: float) -> None:
        """Report a step's time."""
        predicted_s = self._predicted.get(n_waves, 0.0)
        if self._age > 1 and predicted_s > 0.0:  # the first step after a change has no routing of its own behind it
            ratio = min(max(seconds / predicted_s, 0.5), 2.0)
            self._bias[n_waves] += WEIGHT * (ratio - self._bias[n_waves])

    def _predict(self, n_rows: int, n_context: int) -> dict[int, float]:
        """Return the predicted seconds of a step by number of waves; nothing where it cannot be told."""
        costs = self.scheduler.correction.costs
        recent = list(self.scheduler.recent.values())
        if not recent or costs.dense.layer_s(n_rows, n_context) <= 0.0:
            return {}
        sample = recent[:: max(1, len(recent) // N_LAYERS)]
        periods = [self._periods(costs, ready, n_rows, n_context) for ready in sample]
        n_layers = len(costs.experts)
        one, two = (sum(p[i] for p in periods) / len(periods) for i in (0, 1))
        # Two waves share a step's beginning and its end with nobody: half a layer each.
        return {1: one * n_layers, 2: two * (n_layers + 1)}

    def _periods(self, costs: CostModel, ready: LayerReady, n_rows: int, n_context: int) -> tuple[float, float]:
        """Return the seconds from one layer to the next, with one wave and with two."""
        layer, scale = ready.work.layer, n_rows / ready.n_tokens
        first, second = _halved(ready)
        whole = self._plan(
            costs, layer, {e: first.get(e, 0) + second.get(e, 0) for e in {**first, **second}}, scale
        )
        parts = [self._plan(costs, layer, rows, scale) for rows in (first, second)]
        dense_s = costs.dense.layer_s(n_rows, n_context) + costs.host_s
        half_s = costs.dense.layer_s((n_rows + 1) // 2, n_context // 2) + costs.host_s
        cpu_s = sum(costs.cpu_s(layer, [load.n_rows for load in part.cpu]) for part in parts)
        gpu_s = sum(costs.gpu_s(layer, [load.n_rows for load in (*part.gpu, *part.fetch)]) for part in parts)
        link_s = sum(len(part.fetch) for part in parts) * costs.experts[layer].copy_s
        chain_s = half_s + max(part.predicted_s for part in parts)
        return dense_s + whole.predicted_s, max(cpu_s, gpu_s + 2 * half_s, link_s, chain_s)

    def _plan(self, costs: CostModel, layer: int, rows: Mapping[int, int], scale: float) -> Plan:
        """Plan a layer as it would be planned with idle lanes."""
        cache = self.scheduler.cache
        candidates = []
        for expert, n in sorted(rows.items()):
            load = Load(expert, 0, max(1, round(n * scale)))
            resident = cache.slot((layer, expert)) is not None
            candidates.append(Candidate(load, "hit" if resident else "miss"))
        n_fetch = min(cache.n_slots, sum(c.place == "miss" for c in candidates))
        return descent(layer, candidates, costs, Backlog(), n_fetch)


def _halved(ready: LayerReady) -> tuple[dict[int, int], dict[int, int]]:
    """Return the rows by expert of a layer's first half of tokens and of its second."""
    halves: tuple[dict[int, int], dict[int, int]] = ({}, {})
    middle = ready.n_tokens // 2 * ready.top_k
    for load in ready.work.loads:
        for position in ready.work.order[load.start : load.stop]:
            half = halves[position >= middle]
            half[load.expert] = half.get(load.expert, 0) + 1
    return halves
