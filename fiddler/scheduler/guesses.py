"""Predicts a wave's next experts, and decides whether copying one of them ahead pays.

A `Predictor` returns (expert, rows) guesses, likeliest first. A `Rule` picks at most one of the absent guesses to
copy while the link is idle; `promotion` picks an expert that a layer misses often.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key, Rows
from fiddler.cache.slots import Reservation
from fiddler.cost.lanes import Backlog
from fiddler.cost.model import CostModel
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.plan import Planner

HORIZON = 4.0
"""Tokens for which a promoted expert is expected to be visited more than its victim. Of 4, 8, 16 and 32 this is the
only one that loses nowhere in simulations of three machines, and gains up to 3 % where experts are few and big."""


class Guess(NamedTuple):
    """An expert that may be visited in a wave's next layer."""

    expert: int
    n_rows: int
    chance: float


@dataclass(slots=True)
class NextLayer:
    """Guesses for a wave's next layer, and the copies made for them."""

    layer: int
    guesses: tuple[Guess, ...]
    copied: dict[int, float] = field(default_factory=dict)
    """Predicted cost in seconds of each copy made ahead for it, by expert."""
    leased: list[int] = field(default_factory=list)
    """Experts of these copies that have landed; their slots are leased until the layer comes."""


class View(NamedTuple):
    """Inputs of a rule at a moment when the link is free."""

    coming: NextLayer
    absent: Sequence[Guess]
    """Guesses whose expert holds no slot, likeliest first."""
    costs: CostModel
    backlog: Backlog
    gap_s: float
    """Seconds from the end of a layer's experts to the next layer's experts: the dense part."""
    planner: Planner


@dataclass(frozen=True, slots=True)
class Rule:
    """Which of the absent is copied in now, if any, and how copies ahead are kept."""

    choose: Callable[[View], Guess | None]
    staged: bool = False
    """Whether they land in slots for experts in passing; one that is used then takes the place of another."""
    judged: bool = False
    """Whether none is made for a while where the latest did not pay."""


def pays(view: View) -> Guess | None:
    """The likeliest guess, if it can land before its layer's CPU work is done, and gains more than it costs.

    The gain is the CPU's work on it; the price is the CPU time lost to the copy while both read host memory. In the
    gap between two layers the CPU has nothing to do, and a copy costs nothing.
    """
    guess = view.absent[0]
    layer, costs = view.coming.layer, view.costs
    cpu, cpu_s = costs.experts[layer].cpu.at, view.backlog.cpu_s
    now_s = max(cpu_s * costs.contention.cpu, view.backlog.gpu_s)
    then_s = 0.0
    for other in view.absent[1:]:
        then_s += other.chance * cpu[other.n_rows]
    beside_s, alone_s = _copy_s(costs, layer, cpu_s)
    if beside_s + alone_s > now_s + view.gap_s + then_s:
        return None
    price = _price_s(costs, beside_s, alone_s, view.gap_s)
    return guess if guess.chance * saved_s(costs, layer, guess.n_rows) > price else None


PAYS = Rule(pays, judged=True)


def saved_s(costs: CostModel, layer: int, n_rows: int) -> float:
    """Return the seconds of CPU work that a copy saves if its expert is visited, less the GPU's."""
    expert = costs.experts[layer]
    return max(0.0, expert.cpu.at[n_rows] + costs.moves.row_s * n_rows - expert.gpu.at[n_rows])


def price_s(costs: CostModel, layer: int, cpu_s: float, gap_s: float) -> float:
    """Return the seconds that the CPU loses to a copy begun now: `cpu_s` of work left, a gap, and work again."""
    beside_s, alone_s = _copy_s(costs, layer, cpu_s)
    return _price_s(costs, beside_s, alone_s, gap_s)


def _price_s(costs: CostModel, beside_s: float, alone_s: float, gap_s: float) -> float:
    again_s = max(0.0, alone_s - gap_s) * costs.contention.link
    return (1.0 - 1.0 / costs.contention.cpu) * (beside_s + again_s)


def _copy_s(costs: CostModel, layer: int, cpu_s: float) -> tuple[float, float]:
    """Return a copy's seconds: beside `cpu_s` seconds of CPU work, and alone after it."""
    k, copy_s = costs.contention, costs.experts[layer].copy_s
    beside_s = min(copy_s * k.link, cpu_s * k.cpu)
    return beside_s, copy_s - beside_s / k.link


def promotion(
    cache: ExpertCache, keys: Sequence[Key], costs: CostModel, cpu_s: float, gap_s: float
) -> Reservation | None:
    """Return a slot for the expert of one layer's missed `keys` that is visited most, where that is to pay.

    It is held to save the CPU its work at as many more visits as its rate promises over its victim's, for `HORIZON`
    tokens; `cpu_s` and `gap_s` are as in `price_s`.
    """
    found = cache.promotion(keys)
    if found is None:
        return None
    key, advantage = found
    layer = key[0]
    if HORIZON * advantage * saved_s(costs, layer, 1) <= price_s(costs, layer, cpu_s, gap_s):
        return None
    return cache.reserve(key, promotion=True)


MANY = 64
"""Waves whose latest layer is kept: far more than run at a time."""


class Predictor(Protocol):
    """Sees every layer that is ready, in the order in which they come."""

    name: ClassVar[str]

    def expects(self, layer: Layer) -> Rows:
        """Return (expert, n_rows) guesses for the layer after this one; none where it knows nothing."""
        ...


class Nobody:
    """Predicts nothing."""

    name: ClassVar[str] = "off"

    def expects(self, layer: Layer) -> Rows:
        """Return no guesses."""
        return ()


class Transitions:
    """Predicts by counts of how often a visit to one expert came with a visit to another in the next layer."""

    name: ClassVar[str] = "transitions"

    def __init__(self, cache: ExpertCache) -> None:
        n_experts = cache.history.n_experts
        self._counts: list[NDArray[np.float32]] = [np.zeros(pair, np.float32) for pair in pairwise(n_experts)]
        """Counts by layer, `[E, E of the next]`."""
        self._latest: dict[int, tuple[int, NDArray[np.float32]]] = {}  # by wave: its layer, and rows by expert

    def expects(self, layer: Layer) -> Rows:
        """The experts that went most often with those visited now, as many as are visited now."""
        index, loads, number = layer.index, layer.work.loads, layer.wave.number
        before = self._latest.pop(number, None)
        if index and before is not None and before[0] == index - 1:
            rows = np.zeros(self._counts[index - 1].shape[1], np.float32)
            rows[[load.expert for load in loads]] = 1.0
            self._counts[index - 1] += np.outer(before[1], rows)
        if index == len(self._counts) or not loads:
            return ()
        counts = self._counts[index]
        now = np.zeros(counts.shape[0], np.float32)
        now[[load.expert for load in loads]] = 1.0
        if len(self._latest) == MANY:  # of waves that were dropped
            self._latest.clear()
        self._latest[number] = index, now
        # a row of counts says where its expert's visits went; as shares, frequent experts do not drown the others
        total = np.maximum(counts.sum(axis=1), 1.0)
        chances = (now / total) @ counts
        best = np.argsort(-chances, kind="stable")[: len(loads)].tolist()
        return [(expert, 1) for expert in best if chances[expert] > 0.0]


class Auto:
    """A look-ahead where the model allows it, transition counts where it does not."""

    name: ClassVar[str] = "auto"

    def __init__(self, cache: ExpertCache) -> None:
        self._transitions = Transitions(cache)

    def expects(self, layer: Layer) -> Rows:
        """Return the look-ahead's guesses or, without a look-ahead, the usual successors."""
        return layer.ahead or self._transitions.expects(layer)


PREFETCH: Mapping[str, Callable[[ExpertCache], tuple[Predictor, Rule]]] = MappingProxyType(
    {"auto": lambda cache: (Auto(cache), PAYS), "off": lambda cache: (Nobody(), PAYS)}
)
"""An engine's ways of copying ahead, by name: a predictor, and the rule that picks copies from its guesses."""
