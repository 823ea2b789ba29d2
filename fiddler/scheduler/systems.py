"""Whole systems by name: a plan, a cache and a way of copying ahead, as published, to run beside ours.

Each is its authors' algorithm inside our scheduler, on the same machine and with the same host costs: what is
compared is the decisions. Where an original streams experts through buffers of its own, slots for experts in
passing come on top of those it was given, charged to nobody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from types import MappingProxyType
from typing import Literal, get_args

from fiddler.cache.cache import ExpertCache
from fiddler.cache.keys import Key
from fiddler.cache.policy import make_policy
from fiddler.config import PrefetchMode, WaveMode
from fiddler.errors import ConfigError
from fiddler.scheduler.guesses import (
    Auto,
    Frequency,
    LookAhead,
    Nobody,
    Predictor,
    Rule,
    Transitions,
    eager,
    impact,
    pays,
)

STAGED = 64
"""One slot in so many is for experts in passing, where only some are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How experts are placed. The defaults are Fiddler's own."""

    name: str = "fiddler"
    planner: str = "auto"
    policy: str = "forecast"
    half_life: float = 32.0
    admission: float = 1.0
    prefetch: str = "auto"
    promote: bool = True
    waves: WaveMode = "auto"
    staging: Literal["none", "some", "layer"] = "some"
    """Slots for experts in passing: none, a few of those given, or a layer's beyond those given."""
    order: Literal["popularity", "layers", "nobody"] = "popularity"
    """What a static placement goes by: counts of another text, whole layers with the first in front, or nothing."""
    overlap: bool = True
    """Whether CPU and GPU work side by side."""


_PEER = System(admission=inf, staging="none", prefetch="off", promote=False, waves="one")
"""What the peers have in common: every newcomer stays, nothing is copied but what a plan asks for."""

SYSTEMS: Mapping[str, System] = MappingProxyType(
    {
        system.name: system
        for system in (
            System(),
            replace(
                _PEER,
                name="fiddler-2024",
                planner="cheapest-each",
                policy="static",
                staging="layer",
                overlap=False,
            ),
            replace(
                _PEER, name="hybrimoe", planner="two-ended", policy="hybrimoe", prefetch="impact", staging="layer"
            ),
            replace(_PEER, name="hybrimoe-no-prefetch", planner="two-ended", policy="hybrimoe", staging="layer"),
            replace(_PEER, name="ktransformers", planner="cpu-or-stream", policy="static", staging="layer"),
            replace(_PEER, name="freetoken", planner="bandwidth-split", policy="lru", staging="layer"),
            replace(
                _PEER,
                name="mixtral-offloading",
                planner="all-fetch",
                policy="layer-lru",
                prefetch="eager",
                staging="layer",
            ),
            replace(_PEER, name="llama.cpp", planner="all-cpu", policy="static", order="layers"),
            replace(_PEER, name="all-fetch", planner="all-fetch", policy="lru", staging="layer"),
            replace(_PEER, name="all-cpu", planner="all-cpu", policy="static", order="nobody"),
        )
    }
)


def system(name: str) -> System:
    """Return a system by its name. Raises `ConfigError` for an unknown one."""
    if name not in SYSTEMS:
        raise ConfigError(f"unknown system {name!r}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def cache_of(
    placed: System, n_slots: int, n_experts: tuple[int, ...], top_k: int, popular: Sequence[Key] | None = None
) -> ExpertCache:
    """Return a system's empty cache; `popular` is every expert, those first that other text visited most.

    Raises `ConfigError` for a policy that there is not.
    """
    order = popular
    if placed.order == "layers":
        last = zip(n_experts, accumulate(n_experts), strict=True)  # a layer that does not fit is not there in part
        order = [(layer, e) for layer, (n, total) in enumerate(last) if total <= n_slots for e in range(n)]
    elif placed.order == "nobody":
        order = []
    policy = make_policy(placed.policy, n_experts, half_life=placed.half_life, top_k=top_k, order=order)
    some = n_slots // STAGED if n_slots < sum(n_experts) else 0
    beyond = 2 * max(n_experts) if placed.staging == "layer" else 0
    n_staging = beyond or (some if placed.staging == "some" else 0)
    return ExpertCache(n_slots + beyond, n_experts, policy, admission=placed.admission, n_staging=n_staging)


def prefetch_of(name: str, cache: ExpertCache) -> tuple[Predictor, Rule]:
    """Return what guesses, and what is copied of its guesses. Raises `ConfigError` for an unknown name."""
    match name:
        case "off":
            return Nobody(), pays
        case "auto":
            return Auto(cache), pays
        case "look-ahead":
            return LookAhead(), pays
        case "transitions":
            return Transitions(cache), pays
        case "frequency":
            return Frequency(cache), pays
        case "eager":
            return LookAhead(), eager
        case "impact":
            return LookAhead(), impact
    raise ConfigError(f"unknown prefetch {name!r}; known: {', '.join(get_args(PrefetchMode))}")
