"""Whole systems by name, ours and others': a planner, a cache policy and a rule for copying ahead.

Each is its authors' algorithm inside our scheduler, on the same machine and with the same host costs, so that only
decisions are compared. Where an original streams experts through buffers of its own, staging slots come on top of
its slots, at no charge.

The planners divide a layer's loads as published; none of them looks at a lane's backlog. Sources: Kamahori et al.,
"Fiddler", ICLR 2025 (`cheapest_each`); Zhong et al., "HybriMoE", 2025 (`two_ended`, `impact`); FreeToken, 2026
(`bandwidth_split`); KTransformers, SOSP 2025 (`cpu_or_stream`); Eliseev and Mazur, "Fast Inference of
Mixture-of-Experts Language Models with Offloading", 2023 (`eager`).
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from types import MappingProxyType
from typing import ClassVar, Literal

from fiddler.cache import policies
from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key, Rows
from fiddler.config import WaveMode
from fiddler.cost.lanes import Backlog
from fiddler.cost.model import CostModel
from fiddler.errors import ConfigError
from fiddler.lab.policies import make_policy
from fiddler.scheduler import guesses, plan
from fiddler.scheduler.guesses import PAYS, Guess, Predictor, Rule, Transitions, View
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.plan import Candidate, Plan, Planner, all_cpu, all_fetch, assign
from fiddler.scheduler.routing import Load

PROMPT_ROWS = 8
"""Mean rows of a layer's loads from which on FreeToken's rule takes a step for a prompt, which it streams."""
STREAM_ROWS = 64
"""Mean rows from which on KTransformers' rule does: its prompts must be long."""


def cheapest_each(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Run each load where it alone takes less time, copy included: the least sum, ignoring lanes side by side."""
    expert = costs.experts[layer]
    cpu: list[Candidate] = []
    gpu: list[Candidate] = []
    for c in _by_rows(candidates):
        fetch = c.place == "miss"
        gpu_s = expert.gpu(c.load.n_rows) + expert.copy_s * fetch
        if expert.cpu(c.load.n_rows) <= gpu_s or (fetch and not n_fetch):
            cpu.append(c)
        else:
            gpu.append(c)
            n_fetch -= fetch
    return assign(layer, cpu, gpu, costs, backlog)


def two_ended(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Let the GPU take loads from the head and the CPU from the tail; each time the one that would finish first
    takes one.

    The list holds loads in slots or on their way, then the rest, most rows first in both. A fetch starts when the
    link is free.
    """
    expert = costs.experts[layer]
    order = deque([c for c in _by_rows(candidates) if c.place != "miss"])
    order += [c for c in _by_rows(candidates) if c.place == "miss"]
    cpu: list[Candidate] = []
    gpu: list[Candidate] = []
    cpu_s = gpu_s = 0.0
    link_s = max((c.ahead_s for c in candidates), default=0.0)
    while order:
        head, tail = order[0], order[-1]
        head_s, tail_s = expert.gpu(head.load.n_rows), expert.cpu(tail.load.n_rows)
        fetch = head.place == "miss"
        if fetch:
            head_s += max(0.0, link_s + expert.copy_s - gpu_s)
        else:
            head_s += max(0.0, head.ahead_s - gpu_s)
        if gpu_s + head_s <= cpu_s + tail_s and not (fetch and not n_fetch):
            gpu.append(order.popleft())
            gpu_s += head_s
            link_s += expert.copy_s * fetch
            n_fetch -= fetch
        else:
            cpu.append(order.pop())
            cpu_s += tail_s
    return assign(layer, cpu, gpu, costs, backlog)


def bandwidth_split(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Fetch the link's share of both rates, each as it is beside the other, of the misses; of a prompt's all.

    The original does so only where the CPU reads at more than twice the link's rate, and fetches every miss
    elsewhere. That is slower on every machine described here, so the threshold is left out.
    """
    expert, k = costs.experts[layer], costs.contention
    link, cpu = 1.0 / (expert.copy_s * k.link), 1.0 / (expert.cpu(1) * k.cpu)
    if _mean_rows(candidates) >= PROMPT_ROWS:
        return all_fetch(layer, candidates, costs, backlog, n_fetch)
    n_misses = sum(c.place == "miss" for c in candidates)
    return all_fetch(layer, candidates, costs, backlog, min(n_fetch, round(n_misses * link / (link + cpu))))


def cpu_or_stream(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Run every miss on the CPU; in a long prompt copy all of them in."""
    chosen = all_fetch if _mean_rows(candidates) >= STREAM_ROWS else all_cpu
    return chosen(layer, candidates, costs, backlog, n_fetch)


def _by_rows(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (-c.load.n_rows, -c.score, c.load.expert))


def _mean_rows(candidates: Sequence[Candidate]) -> float:
    return sum(c.load.n_rows for c in candidates) / len(candidates) if candidates else 0.0


PLANNERS: Mapping[str, Planner] = MappingProxyType(
    {
        **plan.PLANNERS,
        "bandwidth-split": bandwidth_split,
        "cheapest-each": cheapest_each,
        "cpu-or-stream": cpu_or_stream,
        "two-ended": two_ended,
    }
)


def planner(name: str) -> Planner:
    """Return a planner. Raises `ConfigError` for an unknown name."""
    if name not in PLANNERS:
        raise ConfigError(f"unknown planner {name!r}; known: {', '.join(PLANNERS)}")
    return PLANNERS[name]


class LookAhead:
    """Predicts by the next layer's router, applied to this layer's rows; the model's side computes it."""

    name: ClassVar[str] = "look-ahead"

    def expects(self, layer: Layer) -> Rows:
        """Return the guesses that came with the layer."""
        return layer.ahead


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
    return view.absent[0] if len(view.coming.copied) < 2 else None


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
        for guess in view.coming.guesses
    ]
    return view.planner(view.coming.layer, candidates, view.costs, Backlog(), len(absent))


EAGER = Rule(eager, staged=True)
"""mixtral-offloading copies into buffers for guesses."""
IMPACT = Rule(impact)

PREFETCH: Mapping[str, Callable[[ExpertCache], tuple[Predictor, Rule]]] = MappingProxyType(
    {
        **guesses.PREFETCH,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How experts are placed. The defaults are Fiddler's own."""

    name: str = "fiddler"
    planner: str = "auto"
    policy: str = "forecast"
    half_life: float = 32.0
    admission: float = policies.ADMISSION
    prefetch: str = "auto"
    promote: bool = True
    waves: WaveMode = "auto"
    staging: Literal["none", "some", "layer"] = "some"
    """Staging slots: none, a share of the slots, or as many as a layer's visits on top of them."""
    order: Literal["popularity", "layers", "nobody"] = "popularity"
    """Order of a static placement: by counts of another text, by whole layers with the first in front, or none."""
    overlap: bool = True
    """Whether CPU and GPU work side by side."""


_PEER = System(admission=inf, staging="none", prefetch="off", promote=False, waves="one")
"""Parts that all other systems share: every newcomer stays, and only the plan's copies are made."""

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
    beyond = 2 * max(n_experts) if placed.staging == "layer" else 0
    n_staging = beyond or (policies.n_staging(n_slots, n_experts) if placed.staging == "some" else 0)
    return ExpertCache(n_slots + beyond, n_experts, policy, admission=placed.admission, n_staging=n_staging)
