"""Who runs what: each load of a layer on the CPU, from the GPU's cache, or copied in first.

When a layer's lanes are done: in closed form what `fiddler.cost.lanes.Lanes` gives job by job.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from operator import attrgetter, not_
from typing import Literal

from fiddler.cost.model import CostModel
from fiddler.scheduler.routing import Load


@dataclass(slots=True)
class Race:
    """CPU, GPU and link from now on. Work is in seconds, as it takes alone."""

    cpu_s: float
    """Queued before the layer's own, as the next two are."""
    gpu_s: float
    link_s: float
    copy_s: float
    k_cpu: float
    """How many times as long the CPU's work takes while the link is busy; at least 1, as the next."""
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a plan knows of one load."""

    load: Load
    place: Literal["hit", "landing", "miss"]
    """Its weights are in a slot, on their way into one, or on the host alone."""
    ahead_s: float = 0.0
    """Of a landing one: seconds of link work, as it takes alone, until it has landed."""
    score: float = 0.0
    """The cache's; of misses with equal rows the higher is fetched, for it stays."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Seconds of work queued in each lane, as it takes alone."""

    cpu_s: float = 0.0
    gpu_s: float = 0.0
    link_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Every load of a layer in one of three places."""

    cpu: tuple[Load, ...]
    gpu: tuple[Load, ...]
    """From slots: those READY at once, those landing as they land, in landing order."""
    fetch: tuple[Load, ...]
    """Copied in and then run on the GPU, in the order of the copies."""
    predicted_s: float
    """From now until the last of them is done."""


Planner = Callable[[int, Sequence[Candidate], CostModel, Backlog, int], Plan]
"""`(layer, candidates, costs, backlog, n_fetch) -> Plan`, with at most `n_fetch` fetches."""

_PLACES = ("hit", "landing", "miss")
_TIE = 1e-9
"""What each fetch must gain, as a share of a copy: more than rounding, and no more."""


def best_cut(layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int) -> Plan:
    """Plan for the shortest makespan: the best of all cuts through the loads in the order of their worth.

    The GPU gets the loads before the cut: hits, then experts that land, then misses. Of misses those with most rows
    come first, for all cost the same to copy. Where more rows take the GPU longer, that is also the best order of
    the copies (Johnson, "Optimal two- and three-stage production schedules", 1954). Of equal plans the one with
    fewer fetches wins.
    """
    loads = _Loads(layer, sorted(candidates, key=_worth), costs, backlog)
    return loads.plan(*_cut(loads, n_fetch))


def all_cpu(layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int) -> Plan:
    """Run every miss on the CPU; what is in a slot, or on its way, runs on the GPU."""
    return all_fetch(layer, candidates, costs, backlog, 0)


def all_fetch(
    layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
) -> Plan:
    """Fetch every miss; where there are more than `n_fetch`, those with fewest rows stay on the CPU."""
    order = sorted(candidates, key=_worth)
    n_gpu = sum(c.place != "miss" for c in order) + n_fetch
    return assign(layer, order[n_gpu:], order[:n_gpu], costs, backlog)


def assign(
    layer: int, cpu: Sequence[Candidate], gpu: Sequence[Candidate], costs: CostModel, backlog: Backlog
) -> Plan:
    """Return the plan that runs `cpu` and `gpu` there; the misses in `gpu` are copied in the order given."""
    # Sorting is stable: the misses stay in their order, those to be copied first.
    order = sorted((*gpu, *cpu), key=lambda c: (_PLACES.index(c.place), c.ahead_s))
    loads, on_cpu = _Loads(layer, order, costs, backlog), {c.load.expert for c in cpu}
    on = [c.load.expert not in on_cpu for c in order]
    return loads.plan(on, loads.makespan_s(on))


def _worth(c: Candidate) -> tuple[int, float, int, float, int]:
    """Sort by what the GPU should rather run, which is also the order in which it runs it."""
    return _PLACES.index(c.place), c.ahead_s, -c.load.n_rows, -c.score, c.load.expert


class _Loads:
    """A layer's loads in the order in which the GPU would run them, with their seconds."""

    def __init__(self, layer: int, order: Sequence[Candidate], costs: CostModel, backlog: Backlog) -> None:
        expert, moves, k = costs.experts[layer], costs.moves, costs.contention
        places, rows, ahead_s = [c.place for c in order], [c.load.n_rows for c in order], [c.ahead_s for c in order]
        self.order = order
        self.n_hits = places.count("hit")
        self.n_here = self.n_hits + places.count("landing")
        self.fixed_s = moves.fixed_s
        self.cpu_s = [expert.cpu(n) + moves.row_s * n for n in rows]
        self.gpu_s = [expert.gpu(n) for n in rows]
        self.landing = list(zip(ahead_s, self.gpu_s, strict=True))[self.n_hits : self.n_here]
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
        cpu = [c.load for c in compress(self.order, map(not_, on))]
        gpu = [c.load for c in compress(self.order, on)]
        n_hits, n_here = sum(on[: self.n_hits]), sum(on[: self.n_here])
        by_expert = attrgetter("expert")
        return Plan(
            cpu=tuple(sorted(cpu, key=by_expert)),
            gpu=(*sorted(gpu[:n_hits], key=by_expert), *gpu[n_hits:n_here]),
            fetch=tuple(gpu[n_here:]),
            predicted_s=predicted_s,
        )


def _cut(loads: _Loads, n_fetch: int) -> tuple[list[bool], float]:
    """Return what the GPU runs, and the makespan.

    With each load it takes the CPU ends sooner and the GPU later, so the cut is bisected. Contention spoils that,
    for each copy slows the CPU; hence no fetch and every fetch are tried as well.
    """
    n, n_hits, n_here = len(loads.order), loads.n_hits, loads.n_here
    most = min(n, n_here + n_fetch)
    cpu_s: list[float | None] = [*accumulate(reversed(loads.cpu_s), initial=loads.fixed_s)]
    hits_s: list[float | None] = [*accumulate(loads.gpu_s[:n_hits], initial=0.0)]
    cpu_s[0] = hits_s[0] = None

    def ends(cut: int) -> tuple[float, float]:
        landing, fetch = loads.landing[: max(0, cut - n_hits)], loads.gpu_s[n_here:cut]
        return loads.race.ends(cpu_s[n - cut], hits_s[min(cut, n_hits)], landing, fetch)

    tried = {n_here: ends(n_here)}
    cpu_end_s, gpu_end_s = tried[n_here]
    low, high = 0, n_here
    if cpu_end_s > gpu_end_s and most > n_here:
        low, high = n_here + 1, most
        tried[most] = ends(most)
    while low < high:
        cut = (low + high) // 2
        cpu_end_s, gpu_end_s = tried[cut] = ends(cut)
        low, high = (cut + 1, high) if cpu_end_s > gpu_end_s else (low, cut)
    tie_s = _TIE * loads.race.copy_s
    cut = min(tried, key=lambda cut: max(tried[cut]) + tie_s * max(0, cut - n_here))
    return [True] * cut + [False] * (n - cut), max(tried[cut])
