"""Which experts stay, and no more: the decisions of an `ExpertCache` without its slots, leases and copies."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf

from fiddler.cache.room import Room
from fiddler.cache.standings import Place
from fiddler.cache.worth import Policy


class Residents:
    """The experts that a policy keeps in `n_slots`, for replays: a visit takes no time and cannot fail.

    Who gives way to whom, and who is refused under `admission`, is as in `ExpertCache`; a test compares the two.
    """

    def __init__(self, policy: Policy, n_slots: int, floor: int = 0, *, admission: float = inf) -> None:
        n_experts = policy.history.n_experts
        self._policy = policy
        self._n_slots = n_slots
        self._admission = admission
        self._room = Room(n_slots, len(n_experts), per_layer=policy.per_layer, floor=floor)
        self._keys = [[(layer, expert) for expert in range(n)] for layer, n in enumerate(n_experts)]
        # in a layer experts stand by rank, across layers by worth: ageing moves all of a layer at once
        self._places: list[dict[int, Place]] = [{} for _ in n_experts]
        self._ranked: list[list[Place]] = [[] for _ in n_experts]
        self._fronts: list[Place | None] = [None] * len(n_experts)
        self._worst: list[Place] = []

    def visit(self, layer: int, experts: Sequence[int]) -> int:
        """Keep what the policy wants of a visit that it has observed; return how many experts were there before."""
        places = self._places[layer]
        missing = [expert for expert in experts if expert not in places]
        for expert in experts:  # who is used now is no victim
            places.pop(expert, None)
        if not self._policy.steady:
            self._rank_anew(layer)
        self._settle(layer)
        if self._admission < inf:
            missing.sort(key=lambda expert: self._policy.score((layer, expert)), reverse=True)
        refused = [expert for expert in missing if not self._enters(layer, expert)]
        for expert in experts:
            if expert not in refused:
                places[expert] = self._place(layer, expert)
                heappush(self._ranked[layer], places[expert])
        self._settle(layer)
        return len(experts) - len(missing)

    def _enters(self, layer: int, expert: int) -> bool:
        key = self._keys[layer][expert]
        if not self._policy.admits(key, self._n_slots):
            return False
        if not self._room.vacant(layer):
            victim = self._victim(layer)
            if victim is None or self._is_refused(layer, expert, victim):
                return False
            self._leaves(-victim[3], -victim[2])
        self._room.enter(key)
        return True

    def _is_refused(self, layer: int, expert: int, victim: Place) -> bool:
        if self._admission == inf:
            return False
        new, old = self._policy.score((layer, expert)), self._policy.score((-victim[3], -victim[2]))
        return old > self._admission * new

    def _leaves(self, layer: int, expert: int) -> None:
        del self._places[layer][expert]
        self._room.leave(self._keys[layer][expert])
        self._settle(layer)

    def _victim(self, layer: int) -> Place | None:
        """The worst of the layer itself, or of those that spare a slot."""
        own = self._front(layer)
        worst = self._worst
        while worst and not self._policy.per_layer:
            first, there = worst[0], -worst[0][3]
            if first == self._fronts[there]:
                if self._room.spares(there):
                    return first if own is None else min(first, own)
                self._fronts[there] = None  # it gains no slot before it settles again
            heappop(worst)
        return own

    def _settle(self, layer: int) -> None:
        """Find the layer's worst anew, and its place among the others'."""
        ranked, places = self._ranked[layer], self._places[layer]
        while ranked and places.get(-ranked[0][2]) != ranked[0]:
            heappop(ranked)
        front = self._front(layer)
        if front is not None and front != self._fronts[layer]:
            heappush(self._worst, front)
        self._fronts[layer] = front

    def _front(self, layer: int) -> Place | None:
        if not self._ranked[layer]:
            return None
        rank, last_visit, expert, there = self._ranked[layer][0]
        return rank - self._policy.level(layer), last_visit, expert, there

    def _rank_anew(self, layer: int) -> None:
        places = self._places[layer]
        places.update({expert: self._place(layer, expert) for expert in places})
        self._ranked[layer] = list(places.values())
        heapify(self._ranked[layer])

    def _place(self, layer: int, expert: int) -> Place:
        key = self._keys[layer][expert]
        return self._policy.rank(key), self._policy.history.last_visit(key), -expert, -layer
