"""Ways of copying ahead by name: the engine's, and those of other systems, as published.

Sources: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading", 2023 (`eager`);
Zhong et al., "HybriMoE", 2025 (`impact`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Rows
from fiddler.cost.lanes import Backlog
from fiddler.errors import ConfigError
from fiddler.scheduler import choice
from fiddler.scheduler.guesses import PAYS, Guess, LookAhead, Predictor, Rule, Transitions, View
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.plan import Candidate, Plan
from fiddler.scheduler.routing import Load


class Frequency:
    """The next layer's experts by what the cache holds them to be worth; as many as the wave visits now."""

    name: ClassVar[str] = "frequency"

    def __init__(self, cache: ExpertCache) -> None:
        self._cache = cache

    def expects(self, layer: Layer) -> Rows:
        """The dearest, with one row each."""
        index = layer.index + 1
        n_experts = self._cache.history.n_experts
        if index == len(n_experts):
            return ()
        worth = {expert: self._cache.score((index, expert)) for expert in range(n_experts[index])}
        best = sorted((e for e in worth if worth[e] > 0.0), key=lambda e: -worth[e])
        return [(expert, 1) for expert in best[: len(layer.work.loads)]]


def eager(view: View) -> Guess | None:
    """The likeliest guess, up to two a layer."""
    return view.absent[0] if len(view.forecast.copied) < 2 else None


def impact(view: View) -> Guess | None:
    """The guess whose presence shortens the next layer's plan most."""
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


EAGER = Rule(eager, staged=True)
"""mixtral-offloading copies into buffers for guesses."""
IMPACT = Rule(impact)

PREFETCH: Mapping[str, Callable[[ExpertCache], tuple[Predictor, Rule]]] = MappingProxyType(
    {
        **choice.PREFETCH,
        "look-ahead": lambda cache: (LookAhead(), PAYS),
        "transitions": lambda cache: (Transitions(cache), PAYS),
        "frequency": lambda cache: (Frequency(cache), PAYS),
        "eager": lambda cache: (LookAhead(), EAGER),
        "impact": lambda cache: (LookAhead(), IMPACT),
    }
)


def prefetch_of(name: str, cache: ExpertCache) -> tuple[Predictor, Rule]:
    """Return what guesses, and what is copied of its guesses. Raises `ConfigError` for an unknown name."""
    if name not in PREFETCH:
        raise ConfigError(f"unknown prefetch {name!r}; known: {', '.join(PREFETCH)}")
    return PREFETCH[name](cache)
