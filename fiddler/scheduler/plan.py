"""Who runs what: each load of a layer on the CPU, from the GPU's cache, or copied in first."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, islice
from operator import attrgetter, not_
from typing import Literal

from fiddler.cost.model import CostModel
from fiddler.scheduler.makespan import Race
from fiddler.scheduler.routing import Load


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
_TRIES = 16
"""Changes that a descent tries; ten loads hardly ever need more."""
_NEAR = 12
"""Kinds of loads on either side that changes are made of, those nearest to the cut; ten loads have no more."""


def descent(layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int) -> Plan:
    """Plan for the shortest makespan: the best cut through the loads, then flips and swaps while they shorten it.

    The GPU gets what comes before the cut: hits, then what lands, then misses, those with most rows first, for all
    cost the same to copy. Where more rows take the GPU longer that is also the best order of the copies (Johnson,
    "Optimal two- and three-stage production schedules", 1954). Of equal plans the one with fewer fetches wins.
    """
    loads = _Loads(layer, sorted(candidates, key=_worth), costs, backlog)
    on, cut_s = _best_cut(loads, n_fetch)
    return loads.plan(on, _descend(loads, on, cut_s, n_fetch))


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
        self.kinds = list(zip(zip(places, ahead_s, rows, strict=True), range(len(order)), strict=True))
        """Of loads of one kind only how many run where makes a difference."""
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

    def n_copies(self, on: Sequence[bool]) -> int:
        """Return the number of fetches among the loads with `on`."""
        return sum(on[self.n_here :])

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


def _best_cut(loads: _Loads, n_fetch: int) -> tuple[list[bool], float]:
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


def _descend(loads: _Loads, on: list[bool], best_s: float, n_fetch: int) -> float:
    """Change `on`, whose makespan is `best_s`, while that shortens it; return the makespan then."""
    tie_s, n_copies, n_tries = _TIE * loads.race.copy_s, loads.n_copies(on), _TRIES
    improved = True
    while improved:
        improved = False
        for change in islice(_changes(loads, on, best_s, n_fetch), n_tries):
            n_tries -= 1
            for i in change:
                on[i] = not on[i]
            changed_s, n_changed = loads.makespan_s(on), loads.n_copies(on)
            if changed_s + (n_changed - n_copies) * tie_s < best_s:
                best_s, n_copies, improved = changed_s, n_changed, True
                break
            for i in change:
                on[i] = not on[i]
    return best_s


def _changes(loads: _Loads, on: Sequence[bool], best_s: float, n_fetch: int) -> Iterator[tuple[int, ...]]:
    """Yield loads to change sides, alone and in pairs, where no lane's work alone is then `best_s` long."""
    n_here, n_copies, race, cpu_s, gpu_s = loads.n_here, loads.n_copies(on), loads.race, loads.cpu_s, loads.gpu_s
    off = list(map(not_, on))
    cpu_spare_s = best_s - race.cpu_s - loads.fixed_s - sum(compress(cpu_s, off))
    gpu_spare_s = best_s - race.gpu_s - sum(compress(gpu_s, on))
    # Of a kind the GPU gives up the last and takes the first, which for misses is the one with the higher score.
    gpu = list(reversed(dict(compress(loads.kinds, on)).values()))[:_NEAR]
    cpu = list(reversed(dict(compress(reversed(loads.kinds), reversed(off))).values()))[:_NEAR]
    one_more = n_copies < n_fetch and race.link_s + (n_copies + 1) * race.copy_s < best_s
    free = cpu if one_more else [j for j in cpu if j < n_here]
    for j in free:
        if gpu_s[j] < gpu_spare_s:
            yield (j,)
    for i in gpu:
        if cpu_s[i] < cpu_spare_s:
            yield (i,)
    for i in gpu:
        for j in cpu if i >= n_here else free:
            if cpu_s[i] - cpu_s[j] < cpu_spare_s and gpu_s[j] - gpu_s[i] < gpu_spare_s:
                yield i, j
