"""Where the loads of a layer can run now: candidates for a planner, and slots for what it wants copied in."""

from collections.abc import Mapping, Sequence

from fiddler.cache.cache import ExpertCache
from fiddler.cache.slots import Reservation
from fiddler.scheduler.jobs import Copies, Jobs
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.plan import Candidate, Plan, Planner, all_fetch, assign
from fiddler.scheduler.routing import Load


class Placing:
    """Asks a planner, with what cache, copies and lanes are like, and reserves slots in the cache."""

    def __init__(self, cache: ExpertCache, jobs: Jobs, copies: Copies) -> None:
        self._cache = cache
        self._jobs = jobs
        self._copies = copies

    def plan(self, layer: Layer, loads: Sequence[Load], planner: Planner) -> Plan:
        """Return the plan of a layer's loads, with as many fetches as the planner likes.

        How many the cache would admit is not asked beforehand: the few that it refuses run on the CPU.
        """
        dead = self._jobs.dead
        seen = self._candidates(layer, loads)
        n_fetch = len(seen) if self._cache.n_slots and not ("link" in dead or "gpu" in dead) else 0
        if "cpu" in dead:
            planner = all_fetch
        return planner(layer.index, seen, self._jobs.correction.costs, self._jobs.lanes.backlog(), n_fetch)

    def reserved(self, layer: Layer, loads: Sequence[Load], plan: Plan) -> tuple[Plan, Mapping[Load, Reservation]]:
        """Return the slots reserved for fetches, and the plan, predicted anew where the cache refused some."""
        reserve, index = self._cache.reserve, layer.index
        slots: dict[Load, Reservation] = {}
        for load in plan.fetch:
            reservation = reserve((index, load.expert))
            if reservation is not None:
                slots[load] = reservation
        if len(slots) < len(plan.fetch):
            seen = {c.load: c for c in self._candidates(layer, [load for load in loads if load not in slots])}
            seen |= {load: Candidate(load, "miss") for load in slots}
            on_gpu = [seen[load] for load in (*plan.gpu, *slots)]
            on_cpu = [c for c in seen.values() if c not in on_gpu]
            plan = assign(index, on_cpu, on_gpu, self._jobs.correction.costs, self._jobs.lanes.backlog())
        return plan, slots

    def _candidates(self, layer: Layer, loads: Sequence[Load]) -> list[Candidate]:
        """Return for each load where its weights are, and its expert's worth in the cache."""
        leased, worth, index = layer.leased, layer.worth, layer.index
        copying = {} if "gpu" in self._jobs.dead else self._copies.by_expert
        score, ahead_s = self._cache.score, self._jobs.lanes.ahead_s
        found = []
        for load in loads:
            expert = load.expert
            if expert in leased:
                found.append(Candidate(load, "hit"))
                continue
            key = (index, expert)
            if key in copying:
                found.append(Candidate(load, "landing", ahead_s(copying[key].job)))
            else:
                found.append(Candidate(load, "miss", 0.0, worth[expert] if worth else score(key)))
        return found
