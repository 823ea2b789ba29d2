"""Random layers to plan, the same for the same seed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from fiddler.cost.lanes import Backlog
from fiddler.cost.model import Contention, CostModel, Curve, ExpertCosts, Moves
from fiddler.scheduler.plan import Candidate, Plan, Planner
from fiddler.scheduler.routing import Load

COPY_S = 1e-3
"""Every time is drawn around this one, so each lane is the longest in some instances."""
MAX_ROWS = 512


@dataclass(frozen=True, slots=True)
class Instance:
    """The arguments of a `Planner`."""

    candidates: tuple[Candidate, ...]
    costs: CostModel
    backlog: Backlog
    n_fetch: int

    def plan(self, planner: Planner) -> Plan:
        """Return what `planner` makes of it."""
        return planner(0, self.candidates, self.costs, self.backlog, self.n_fetch)

    def named(self, loads: Iterable[Load]) -> list[Candidate]:
        """Return the candidates of some loads, in the loads' order."""
        by_load = {c.load: c for c in self.candidates}
        return [by_load[load] for load in loads]


def instance(seed: int, n_loads: int | None = None) -> Instance:
    """Draw a layer of `n_loads` experts, or of one to ten."""
    rng = Random(seed)
    n = n_loads or rng.randint(1, 10)
    link_s = rng.choice((0.0, COPY_S * rng.uniform(0.0, 4.0)))
    return Instance(
        candidates=_candidates(rng, n, link_s),
        costs=_costs(rng),
        backlog=Backlog(_some(rng, 4 * COPY_S), _some(rng, 2 * COPY_S), link_s),
        n_fetch=rng.choice((n, rng.randint(0, n))),
    )


def instances(seeds: Iterable[int], n_loads: int | None = None) -> list[Instance]:
    """Draw one layer a seed."""
    return [instance(seed, n_loads) for seed in seeds]


def _candidates(rng: Random, n: int, link_s: float) -> tuple[Candidate, ...]:
    """Most rows are few and some are many; a decode step's are all but equal."""
    most, skew, p_hit = rng.choice((1, 4, MAX_ROWS)), rng.uniform(1.0, 4.0), rng.uniform(0.0, 0.9)
    ahead = sorted(rng.uniform(0.0, link_s) for _ in range(rng.randint(0, 2))) if link_s else []
    found: list[Candidate] = []
    for expert in range(n):
        n_rows = max(1, round(most ** rng.random() ** skew))
        load = Load(expert, expert * MAX_ROWS, expert * MAX_ROWS + n_rows)
        if rng.random() < p_hit:
            found.append(Candidate(load, "hit", score=rng.random()))
        elif ahead and rng.random() < 0.5:
            found.append(Candidate(load, "landing", ahead.pop(0), score=rng.random()))
        else:
            found.append(Candidate(load, "miss", score=rng.random()))
    return tuple(found)


def _costs(rng: Random) -> CostModel:
    cpu = _curve(rng, COPY_S * _log_uniform(rng, 0.1, 4.0), rows_at_knee=_log_uniform(rng, 1.0, 32.0))
    gpu = _curve(rng, COPY_S * _log_uniform(rng, 0.01, 1.0), rows_at_knee=_log_uniform(rng, 8.0, 512.0))
    expert = ExpertCosts(cpu, gpu, COPY_S, nbytes=1 << 20)
    contention = rng.choice((Contention(), Contention(rng.uniform(1.0, 2.0), rng.uniform(1.0, 2.0))))
    return CostModel((expert,), contention, Moves(_some(rng, 0.1 * COPY_S), _some(rng, 0.01 * COPY_S)))


def _curve(rng: Random, read_s: float, rows_at_knee: float) -> Curve:
    """A roofline, or what measuring one would give: its points, each off by up to a fifth, still ascending."""
    roofline = Curve.roofline(_some(rng, 0.2 * read_s), read_s, read_s / rows_at_knee)
    if rng.random() < 0.5:
        return roofline
    points: list[tuple[float, float]] = []
    for n in (1, 4, 16, 64, 256):
        seconds = roofline(n) * rng.uniform(0.8, 1.2)
        points.append((float(n), max(seconds, points[-1][1]) if points else seconds))
    return Curve(tuple(points))


def _some(rng: Random, most: float) -> float:
    """Half of the time nothing."""
    return rng.choice((0.0, rng.uniform(0.0, most)))


def _log_uniform(rng: Random, low: float, high: float) -> float:
    return low * math.exp(rng.random() * math.log(high / low))
