"""Whether a copy that no layer waits for is made: rules, by what it costs and what it may save."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fiddler.cache.cache import ExpertCache
from fiddler.cache.keys import Key
from fiddler.cache.slots import Reservation
from fiddler.cost.model import CostModel
from fiddler.scheduler.plan import Backlog, Candidate, Plan, Planner
from fiddler.scheduler.routing import Load

HORIZON = 4.0
"""Tokens for which an expert's advantage over the one it displaces is held to last. Of 4, 8, 16 and 32 the only one
that loses nowhere in simulations of three machines, and gains up to 3 % where experts are few and big."""


class Guess(NamedTuple):
    """An expert that may be visited in a wave's next layer."""

    expert: int
    n_rows: int
    chance: float


@dataclass(slots=True)
class Forecast:
    """What is expected of a wave's next layer."""

    layer: int
    guesses: tuple[Guess, ...]
    copied: dict[int, float] = field(default_factory=dict)
    """Seconds that each copy made ahead for it was held to cost, by expert."""
    leased: list[int] = field(default_factory=list)
    """Of these, those that have landed: their slots stay until the layer comes."""


@dataclass(frozen=True, slots=True)
class View:
    """What a rule may look at when the link is free."""

    forecast: Forecast
    absent: Sequence[Guess]
    """Those of its guesses that hold no slot, likeliest first."""
    costs: CostModel
    backlog: Backlog
    gap_s: float
    """From the end of a layer's experts to the next layer's: the dense part."""
    planner: Planner


Rule = Callable[[View], Guess | None]
"""Which of the absent is copied in now, if any."""


def pays(view: View) -> Guess | None:
    """The likeliest guess, if it can land before its layer's CPU work is done, and gains more than it costs.

    Gained is the CPU's work on it; the price is what the CPU loses to the copy while both read host memory. In the
    gap between two layers the CPU has nothing to do, and a copy costs nothing.
    """
    guess = view.absent[0]
    layer, costs = view.forecast.layer, view.costs
    cpu, cpu_s = costs.experts[layer].cpu, view.backlog.cpu_s
    now_s = max(cpu_s * costs.contention.cpu, view.backlog.gpu_s)
    then_s = sum(guess.chance * cpu(guess.n_rows) for guess in view.absent[1:])
    if sum(_copy_s(costs, layer, cpu_s)) > now_s + view.gap_s + then_s:
        return None
    price = price_s(costs, layer, view.backlog.cpu_s, view.gap_s)
    return guess if guess.chance * saved_s(costs, layer, guess.n_rows) > price else None


def saved_s(costs: CostModel, layer: int, n_rows: int) -> float:
    """Return the seconds of CPU work that a copy saves if its expert is visited, less the GPU's."""
    expert = costs.experts[layer]
    return max(0.0, expert.cpu(n_rows) + costs.moves.row_s * n_rows - expert.gpu(n_rows))


def price_s(costs: CostModel, layer: int, cpu_s: float, gap_s: float) -> float:
    """Return the seconds that the CPU loses to a copy begun now: `cpu_s` of work left, a gap, and work again."""
    beside_s, alone_s = _copy_s(costs, layer, cpu_s)
    again_s = max(0.0, alone_s - gap_s) * costs.contention.link
    return (1.0 - 1.0 / costs.contention.cpu) * (beside_s + again_s)


def _copy_s(costs: CostModel, layer: int, cpu_s: float) -> tuple[float, float]:
    """Return the seconds of a copy begun now beside `cpu_s` of the CPU's work, and after it, alone."""
    k, copy_s = costs.contention, costs.experts[layer].copy_s
    beside_s = min(copy_s * k.link, cpu_s * k.cpu)
    return beside_s, copy_s - beside_s / k.link


def eager(view: View) -> Guess | None:
    """The likeliest guess, up to two a layer: mixtral-offloading's rule (Eliseev and Mazur, 2023)."""
    return view.absent[0] if len(view.forecast.copied) < 2 else None


def impact(view: View) -> Guess | None:
    """The guess whose presence shortens the next layer's plan most: HybriMoE's rule (Zhong et al., 2025)."""
    absent = {guess.expert for guess in view.absent}
    best, gain_s = None, 0.0
    without_s = _planned(view, absent).predicted_s
    for guess in {guess.n_rows: guess for guess in reversed(view.absent)}.values():  # equal rows gain the same
        gained_s = without_s - _planned(view, absent - {guess.expert}).predicted_s
        if gained_s > gain_s:
            best, gain_s = guess, gained_s
    return best


def _planned(view: View, absent: set[int]) -> Plan:
    candidates = [
        Candidate(Load(guess.expert, 0, guess.n_rows), "miss" if guess.expert in absent else "hit")
        for guess in view.forecast.guesses
    ]
    return view.planner(view.forecast.layer, candidates, view.costs, Backlog(), len(absent))


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
