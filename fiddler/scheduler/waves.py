"""A step's rows: which travel in it, and whether as one wave or as two halves.

Every decoding sequence travels, and chunks of prompts beside them. Two waves let the experts of one run beside the
dense part of the other, and the second finds experts in slots that the first fetched; but an expert that both
visit is read twice. So the choice is by the cost model's prediction, corrected by measured steps.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from fiddler.config import WaveMode
from fiddler.cost.lanes import Backlog
from fiddler.cost.model import CostModel
from fiddler.scheduler.cpu_only import CpuOnly
from fiddler.scheduler.layer import Came
from fiddler.scheduler.plan import Candidate, Plan
from fiddler.scheduler.routing import Load

if TYPE_CHECKING:
    from fiddler.scheduler.core import Scheduler


class Progress(Protocol):
    """How far a request is: the parts of it that assembling reads."""

    n_past: int

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        ...

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt has not been run yet."""
        ...


S = TypeVar("S", bound=Progress)


@dataclass(frozen=True, slots=True)
class RowSpan(Generic[S]):
    """Rows `start:stop` of one sequence; `last` where a token is picked from its last row."""

    request: S
    start: int
    stop: int
    last: bool

    @property
    def n_rows(self) -> int:
        """Rows of this sequence in the step."""
        return self.stop - self.start


def assemble(running: Iterable[S], chunk_tokens: int, *, chunked: bool) -> list[RowSpan[S]]:
    """Choose the next step's rows.

    Decoding sequences always go. Prompts follow in order until `chunk_tokens` are used up; the last one is cut
    there if `chunked`, and otherwise goes whole, so at least one prompt always advances.
    """
    spans: list[RowSpan[S]] = []
    prompts: list[S] = []
    for request in running:
        if request.prefilling:
            prompts.append(request)
        else:
            spans.append(RowSpan(request, request.n_past, request.n_past + 1, last=True))
    room = chunk_tokens
    for request in prompts:
        if room <= 0:
            break
        stop = min(request.n_prompt, request.n_past + room) if chunked else request.n_prompt
        spans.append(RowSpan(request, request.n_past, stop, last=stop == request.n_prompt))
        room -= stop - request.n_past
    return spans


def halves(spans: Sequence[RowSpan[S]], *, cut: bool) -> list[list[RowSpan[S]]]:
    """Return the spans as two waves with about as many rows each, or as one where there is nothing to halve.

    With `cut` the span in the middle is cut in two, the first part ending the first wave; its later rows attend
    to the earlier ones, so the second wave must not overtake the first.
    """
    half = sum(span.n_rows for span in spans) // 2
    first: list[RowSpan[S]] = []
    second: list[RowSpan[S]] = []
    for span in spans:
        room = half - sum(s.n_rows for s in first)
        if second or room <= 0:
            second.append(span)
        elif span.n_rows <= room:
            first.append(span)
        elif cut:
            middle = span.start + room
            first.append(RowSpan(span.request, span.start, middle, last=False))
            second.append(RowSpan(span.request, middle, span.stop, span.last))
        else:
            second.append(span)
    return [part for part in (first, second) if part]


MARGIN = 0.07
"""Two waves must be predicted to be faster by this share, since the prediction is for a typical layer."""
DOUBT = 1.1
"""Factor on the prediction for two waves until some were measured: it counts contention within one wave only.
Simulations of the profiles in `bench/machines` gave 1.0 to 1.2."""
ENOUGH = 3
"""Steps of one kind after which their bias is believed."""
EVERY = 16
"""Steps between predictions."""
N_LAYERS = 8
"""Layers that are predicted, spread over the model."""
LIKE = 1.5
"""Steps whose rows differ by at most this factor are alike: the time of one tells something about the other."""
WEIGHT = 0.2
"""Weight of the latest step in a bias."""


@dataclass(slots=True)
class _Kind:
    """Measurements of steps with one wave, or with two."""

    predicted_s: float = 0.0
    bias: float = 1.0
    n_steps: int = 0

    def took(self, seconds: float) -> None:
        """Learn from a step."""
        if self.predicted_s > 0.0:
            self.n_steps += 1
            self.bias += max(WEIGHT, 1.0 / self.n_steps) * (seconds / self.predicted_s - self.bias)

    @property
    def expected_s(self) -> float:
        """The expected seconds of a step."""
        return self.predicted_s * self.bias


@dataclass(slots=True)
class Waves:
    """Chooses one or two waves for every step, and corrects its own predictions."""

    mode: WaveMode
    scheduler: "Scheduler | CpuOnly"
    top_k: int
    _one: _Kind = field(default_factory=_Kind)
    _two: _Kind = field(default_factory=_Kind)
    _n_rows: int = 0
    _age: int = 0
    _learns: bool = False
    """Whether the step under way was chosen by prediction."""

    def choose(self, n_rows: int, n_context: int) -> int:
        """Return how many waves a step of `n_rows` rows over `n_context` tokens of past should be: 1 or 2."""
        self._learns = self.mode == "auto" and n_rows >= 2
        if not self._learns:
            self.scheduler.recent = None
            return 2 if self.mode == "two" and n_rows >= 2 else 1
        if not self._n_rows / LIKE <= n_rows <= self._n_rows * LIKE:
            self._n_rows, self._age, self._one, self._two = n_rows, 0, _Kind(), _Kind()
        if self._age % EVERY == 0 or self._age == 1:  # the first step of a kind had no routing of its own to go by
            self._one.predicted_s, self._two.predicted_s = self._predict(n_rows, n_context)
        self._age += 1
        self.scheduler.recent = {}
        return 2 if self._pays() else 1

    def took(self, n_waves: int, seconds: float) -> None:
        """Report a step's time."""
        if self._learns:
            (self._one if n_waves == 1 else self._two).took(seconds)

    def _pays(self) -> bool:
        one, two = self._one, self._two
        if one.n_steps < ENOUGH or two.predicted_s <= 0.0:
            return False
        if two.n_steps < ENOUGH:
            return two.predicted_s * one.bias * DOUBT < one.expected_s * (1.0 - MARGIN)
        return two.expected_s < one.expected_s

    def _predict(self, n_rows: int, n_context: int) -> tuple[float, float]:
        """Return the predicted seconds of a step of one wave and of two; zeros where no dense part is known."""
        costs = self.scheduler.correction.costs
        n_layers = len(costs.experts)
        if costs.dense.layer_s(n_rows, n_context) <= 0.0:
            return 0.0, 0.0
        sample = range(0, n_layers, max(1, n_layers // N_LAYERS))
        periods = [self._periods(costs, layer, n_rows, n_context) for layer in sample]
        one, two = (sum(p[i] for p in periods) / len(periods) for i in (0, 1))
        # Two waves share a step's beginning and its end with nobody: half a layer each.
        return one * n_layers, two * (n_layers + 1)

    def _periods(self, costs: CostModel, layer: int, n_rows: int, n_context: int) -> tuple[float, float]:
        """Return the seconds from one layer to the next, with one wave and with two."""
        first, second = self._halves(layer, n_rows)
        union = {expert: first.get(expert, 0) + second.get(expert, 0) for expert in {**first, **second}}
        whole, ahead = self._plan(costs, layer, union), self._plan(costs, layer, first)
        behind = self._plan(costs, layer, second, {load.expert for load in ahead.fetch})
        dense_s = costs.dense.layer_s(n_rows, n_context) + costs.host_s
        half_s = costs.dense.layer_s((n_rows + 1) // 2, n_context // 2) + costs.host_s
        parts = ahead, behind
        cpu_s = sum(costs.cpu_s(layer, [load.n_rows for load in part.cpu]) for part in parts)
        gpu_s = sum(costs.gpu_s(layer, [load.n_rows for load in (*part.gpu, *part.fetch)]) for part in parts)
        link_s = sum(len(part.fetch) for part in parts) * costs.experts[layer].copy_s
        chain_s = half_s + max(part.predicted_s for part in parts)
        return dense_s + whole.predicted_s, max(cpu_s, gpu_s + 2 * half_s, link_s, chain_s)

    def _plan(self, costs: CostModel, layer: int, rows: Mapping[int, int], fetched: Collection[int] = ()) -> Plan:
        """Plan a layer with idle lanes, some experts just fetched."""
        cache = self.scheduler.cache
        there = [expert in fetched or cache.slot((layer, expert)) is not None for expert in rows]
        loads = [Load(expert, 0, n) for expert, n in rows.items()]
        candidates = [Candidate(load, "hit" if hit else "miss") for load, hit in zip(loads, there, strict=True)]
        return self.scheduler.planner(layer, candidates, costs, Backlog(), min(cache.n_slots, there.count(False)))

    def _halves(self, layer: int, n_rows: int) -> tuple[Mapping[int, int], Mapping[int, int]]:
        """Return the rows of a step's two halves: those of the latest step if it was alike, else spread evenly."""
        latest = (self.scheduler.recent or {}).get(layer, ())
        n_tokens = sum(n_tokens for _, n_tokens, _ in latest)
        if n_rows / LIKE <= n_tokens <= n_rows * LIKE:
            return _halved(latest)
        n_experts = self.scheduler.cache.history.n_experts[layer]
        visits = n_rows // 2 * self.top_k, (n_rows + 1) // 2 * self.top_k
        return _even(n_experts, visits[0], last=False), _even(n_experts, visits[1], last=True)


def _even(n_experts: int, n_visits: int, *, last: bool) -> Mapping[int, int]:
    """Spread visits over as many experts as random ones would reach, the first of them or the last."""
    reached = max(1, round(n_experts * (1.0 - (1.0 - 1.0 / n_experts) ** n_visits)))
    experts = range(n_experts - reached, n_experts) if last else range(reached)
    return dict.fromkeys(experts, max(1, round(n_visits / reached)))


def _halved(latest: Sequence[Came]) -> tuple[Mapping[int, int], Mapping[int, int]]:
    """Return the rows by expert of a layer's first half of tokens and of its second, as they came in one step."""
    halves: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for i, (work, n_tokens, top_k) in enumerate(latest):
        middle = n_tokens // 2 * top_k
        for load in work.loads:
            for position in work.order[load.start : load.stop]:
                half = halves[min(i, 1) if len(latest) > 1 else position >= middle]
                half[load.expert] = half.get(load.expert, 0) + 1
    return halves
