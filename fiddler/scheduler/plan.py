"""Plans a layer: each load runs on the CPU, from a slot, or is copied in first.

`Race` predicts when CPU and GPU finish a layer, in closed form; its result equals simulating `cost.lanes.Lanes` job
by job.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from math import inf
from operator import attrgetter, not_
from types import MappingProxyType
from typing import Literal, NamedTuple

from fiddler.cost.lanes import Backlog
from fiddler.cost.model import CostModel
from fiddler.scheduler.routing import Load


@dataclass(slots=True)
class Race:
    """Backlogs and slowdowns of CPU, GPU and link at planning time. Work is in seconds, as it takes alone."""

    cpu_s: float
    """Work queued before the layer's own; the next two are the link's and the GPU's."""
    gpu_s: float
    link_s: float
    copy_s: float
    k_cpu: float
    """Factor on the CPU's time while the link is busy, at least 1; the next is the link's."""
    k_link: float

    def ends(
        self,
        cpu_s: float | None,
        hits_s: float | None,
        landing: Collection[tuple[float, float]],
        fetch: Collection[float],
    ) -> tuple[float, float]:
        """Return the seconds until CPU and GPU have done the layer's loads, 0.0 where there are none.

        `cpu_s` is the CPU's work on its loads, `hits_s` the GPU's on hits; `None` without any. `landing` holds the
        link's work until each has landed and the GPU's on it, `fetch` the GPU's on each that is copied, in order.

        With `W` all the work of a lane, CPU and link slow each other for `t = min(W_cpu · k_cpu, W_link · k_link)`
        seconds, in which either does `t / k` of its work; so work `w` is done at `w + min(w, t / k) · (k - 1)`.
        """
        copy_s, link_s, free_s, extra = self.copy_s, self.link_s, self.gpu_s, self.k_link - 1.0
        all_cpu_s = self.cpu_s + (cpu_s or 0.0)
        both_s = min(all_cpu_s * self.k_cpu, (link_s + copy_s * len(fetch)) * self.k_link)
        slow_s = both_s / self.k_link
        if hits_s:
            free_s += hits_s
        for w, gpu_s in landing:
            landed_s = w + (w if w < slow_s else slow_s) * extra
            free_s = (free_s if free_s > landed_s else landed_s) + gpu_s
        for gpu_s in fetch:
            link_s += copy_s
            landed_s = link_s + (link_s if link_s < slow_s else slow_s) * extra
            free_s = (free_s if free_s > landed_s else landed_s) + gpu_s
        cpu_end_s = all_cpu_s + min(all_cpu_s, both_s / self.k_cpu) * (self.k_cpu - 1.0)
        return (
            0.0 if cpu_s is None else cpu_end_s,
            free_s if hits_s is not None or landing or fetch else 0.0,
        )


class Candidate(NamedTuple):
    """One load as a planner sees it."""

    load: Load
    place: Literal["hit", "landing", "miss"]
    """Where its weights are: in a slot, on their way into one, or on the host."""
    ahead_s: float = 0.0
    """For weights on their way: seconds of link work, as it takes alone, until they land."""
    score: float = 0.0
    """Worth in the cache; of misses with equal rows the higher is fetched, since it will stay."""


class Plan(NamedTuple):
    """Every load of a layer in one of three places."""

    cpu: tuple[Load, ...]
    gpu: tuple[Load, ...]
    """From slots: those READY at once, those landing as they land, in landing order."""
    fetch: tuple[Load, ...]
    """Copied in and then run on the GPU, in the order of the copies."""
    predicted_s: float
    """Seconds from now until the last load is done."""


Planner = Callable[[int, Sequence[Candidate], CostModel, Backlog, int], Plan]
"""`(layer, candidates, costs, backlog, n_fetch) -> Plan`, with at most `n_fetch` fetches."""

_PLACES = {"hit": 0, "landing": 1, "miss": 2}
_expert = attrgetter("expert")
_TIE = 1e-9
"""Least gain of each fetch, as a share of a copy: more than rounding errors."""


def best_cut(layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int) -> Plan:
    """Plan for the shortest makespan: the best of all cuts through the loads in the order of their worth.

    The GPU gets the loads before the cut: hits, then experts that land, then misses. Of misses those with most rows
    come first, for all cost the same to copy. Where more rows take the GPU longer, that is also the best order of
    the copies (Johnson, "Optimal two- and three-stage production schedules", 1954). Of equal plans the one with
    fewer fetches wins.
    """
    loads = _Loads(layer, _in_order(candidates), costs, backlog)
    cut, predicted_s = _cut(loads, n_fetch)
    return loads.plan([True] * cut + [False] * (len(candidates) - cut), predicted_s)


def all_cpu(layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int) -> Plan:
    """Run every miss on the CPU; loads in slots, or on their way there, run on the GPU."""
    return all_fetch(layer, candidates, costs, backlog, 0)


def all_fetch(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Fetch every miss; where there are more than `n_fetch`, those with fewest rows stay on the CPU."""
    order = _in_order(candidates)
    n_gpu = sum(c.place != "miss" for c in order) + n_fetch
    return assign(layer, order[n_gpu:], order[:n_gpu], costs, backlog)


PLANNERS: Mapping[str, Planner] = MappingProxyType({"auto": best_cut, "all-cpu": all_cpu, "all-fetch": all_fetch})
"""Those of an engine, by name; the lab has more, for `fiddler simulate`."""


def assign(
    layer: int, cpu: Sequence[Candidate], gpu: Sequence[Candidate], costs: CostModel, backlog: Backlog
) -> Plan:
    """Return the plan with these loads on `cpu` and `gpu`; misses in `gpu` are copied in the order given."""
    # Sorting is stable: the misses stay in their order, those to be copied first.
    order = sorted((*gpu, *cpu), key=lambda c: (_PLACES[c.place], c.ahead_s))
    loads, on_cpu = _Loads(layer, order, costs, backlog), {c.load.expert for c in cpu}
    on = [c.load.expert not in on_cpu for c in order]
    return loads.plan(on, loads.makespan_s(on))


def _in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort by what the GPU should rather run, which is also the order in which it runs it."""
    keyed = []
    for c in candidates:
        load = c.load
        keyed.append((_PLACES[c.place], c.ahead_s, -load.n_rows, -c.score, load.expert, load.start, c))
    keyed.sort()
    return [item[-1] for item in keyed]


class _Loads:
    """A layer's loads in the order in which the GPU would run them, with their seconds."""

    def __init__(self, layer: int, order: Sequence[Candidate], costs: CostModel, backlog: Backlog) -> None:
        expert, moves, k = costs.experts[layer], costs.moves, costs.contention
        self.order = order
        self.n_hits = 0
        self.fixed_s = moves.fixed_s
        self.cpu_s: list[float] = []
        self.gpu_s: list[float] = []
        self.landing: list[tuple[float, float]] = []
        cpu, gpu, row_s = expert.cpu.at, expert.gpu.at, moves.row_s
        for c in order:
            n = c.load.n_rows
            self.cpu_s.append(cpu[n] + row_s * n)
            self.gpu_s.append(gpu[n])
            if c.place == "hit":
                self.n_hits += 1
            elif c.place == "landing":
                self.landing.append((c.ahead_s, gpu[n]))
        self.n_here = self.n_hits + len(self.landing)
        self.race = Race(backlog.cpu_s, backlog.gpu_s, backlog.link_s, expert.copy_s, k.cpu, k.link)

    def makespan_s(self, on: Sequence[bool]) -> float:
        """Return the makespan if the GPU runs the loads with `on` and the CPU the others."""
        hits = on[: self.n_hits]
        ends = self.race.ends(
            None if all(on) else self.fixed_s + sum(compress(self.cpu_s, map(not_, on))),
            sum(compress(self.gpu_s, hits)) if any(hits) else None,
            list(compress(self.landing, on[self.n_hits : self.n_here])),
            list(compress(self.gpu_s[self.n_here :], on[self.n_here :])),
        )
        return max(ends)

    def plan(self, on: Sequence[bool], predicted_s: float) -> Plan:
        """Return the loads with `on` as the GPU's, and the others as the CPU's."""
        cpu: list[Load] = []
        gpu: list[Load] = []
        landing: list[Load] = []
        fetch: list[Load] = []
        places = {"hit": gpu, "landing": landing, "miss": fetch}
        for c, on_gpu in zip(self.order, on, strict=True):
            (places[c.place] if on_gpu else cpu).append(c.load)
        cpu.sort(key=_expert)
        gpu.sort(key=_expert)
        return Plan(tuple(cpu), (*gpu, *landing), tuple(fetch), predicted_s)


def _cut(loads: _Loads, n_fetch: int) -> tuple[int, float]:
    """Return how many loads the GPU runs, from the first, and the makespan.

    With each load it takes the CPU ends sooner and the GPU later, so the cut is bisected. Contention spoils that,
    for each copy slows the CPU; hence no fetch and every fetch are tried as well.
    """
    n, n_hits, n_here = len(loads.order), loads.n_hits, loads.n_here
    most = min(n, n_here + n_fetch)
    cpu_s: list[float | None] = [*accumulate(reversed(loads.cpu_s), initial=loads.fixed_s)]
    hits_s: list[float | None] = [*accumulate(loads.gpu_s[:n_hits], initial=0.0)]
    more_s = loads.race.cpu_s + (cpu_s[n - n_here + 1] or 0.0) if n_here else inf  # the CPU's with one load more
    cpu_s[0] = hits_s[0] = None

    def ends(cut: int) -> tuple[float, float]:
        landing, fetch = loads.landing[: max(0, cut - n_hits)], loads.gpu_s[n_here:cut]
        return loads.race.ends(cpu_s[n - cut], hits_s[min(cut, n_hits)], landing, fetch)

    tried = {n_here: ends(n_here)}
    cpu_end_s, gpu_end_s = tried[n_here]
    low = high = 0
    if cpu_end_s > gpu_end_s:
        if most > n_here:
            low, high = n_here + 1, most
            tried[most] = ends(most)
    elif more_s < gpu_end_s:
        high = n_here
    while low < high:
        cut = (low + high) // 2
        cpu_end_s, gpu_end_s = tried[cut] = ends(cut)
        low, high = (cut + 1, high) if cpu_end_s > gpu_end_s else (low, cut)
    tie_s = _TIE * loads.race.copy_s
    best, best_s, worth_s = n_here, inf, inf
    for cut, (cpu_end_s, gpu_end_s) in tried.items():
        end_s = cpu_end_s if cpu_end_s > gpu_end_s else gpu_end_s
        fined_s = end_s + tie_s * (cut - n_here) if cut > n_here else end_s
        if fined_s < worth_s:
            best, best_s, worth_s = cut, end_s, fined_s
    return best, best_s
