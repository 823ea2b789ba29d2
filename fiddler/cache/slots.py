"""Slots of the accelerator's expert memory: their states, quotas by layer, staging slots, and victims.

`Slots` takes each slot through FREE → LOADING → READY and counts leases, which pin it. `Quotas` says which layer
may take a slot from which: a quota per layer, or one pool in which every layer keeps a floor. `Staging` lists
experts that hold a slot only until the next one needs it. `Victims` finds the worst expert that may give way, by
an array minimum, on demand.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.policy import Key, Policy


class Reservation(NamedTuple):
    """A slot promised to an expert whose copy is to be made or under way; `victim` had it before."""

    key: Key
    slot: int
    generation: int
    victim: Key | None


class Slots:
    """Every slot is in exactly one of `_free`, `_loading` and `ready`. Misuse is a ValueError."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._free = list(range(n_slots - 1, -1, -1))
        self._loading: dict[Key, Reservation] = {}
        self.ready: dict[Key, int] = {}
        """READY experts, each with its slot."""
        self._generations = [0] * n_slots
        self.leases: dict[Key, int] = {}
        """How often each leased expert is."""

    @property
    def n_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def n_ready(self) -> int:
        """Slots whose expert can be used."""
        return len(self.ready)

    def loading(self, key: Key) -> Reservation | None:
        """The copy under way for an expert."""
        return self._loading.get(key)

    def idle(self, key: Key) -> bool:
        """Whether the expert is READY and nobody leases it."""
        return key in self.ready and key not in self.leases

    def begin(self, key: Key, victim: Key | None = None) -> Reservation:
        """FREE → LOADING, out of an idle `victim`'s slot where one is named; its generation goes up."""
        if key in self._loading or key in self.ready:
            raise ValueError(f"expert {key} has a slot already")
        if victim is not None:
            self.evict(victim)
        if not self._free:
            raise ValueError("no slot is free")
        slot = self._free.pop()
        self._generations[slot] += 1
        reservation = Reservation(key, slot, self._generations[slot], victim)
        self._loading[key] = reservation
        return reservation

    def evict(self, key: Key) -> None:
        """READY → FREE; ValueError for an expert that is not idle."""
        if key not in self.ready or key in self.leases:
            raise ValueError(f"expert {key} cannot be evicted: not ready, or leased")
        self._free.append(self.ready.pop(key))

    def landed(self, reservation: Reservation) -> None:
        """LOADING → READY; ValueError for a reservation that is not the slot's present one."""
        self._end(reservation)
        self.ready[reservation.key] = reservation.slot

    def failed(self, reservation: Reservation) -> None:
        """LOADING → FREE; ValueError for a reservation that is not the slot's present one."""
        self._end(reservation)
        self._free.append(reservation.slot)

    def _end(self, reservation: Reservation) -> None:
        if self._loading.get(reservation.key) != reservation:
            raise ValueError(f"{reservation} is stale: its copy has ended already")
        del self._loading[reservation.key]

    def lease(self, key: Key) -> int:
        """Pin a READY expert, once more, and say where it is; ValueError where it is not READY."""
        if key not in self.ready:
            raise ValueError(f"expert {key} is not ready")
        self.leases[key] = self.leases.get(key, 0) + 1
        return self.ready[key]

    def lease_ready(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Pin those of a layer's experts that are READY; returns them."""
        leased, ready, leases = [], self.ready, self.leases
        for expert in experts:
            key = layer, expert
            if key in ready:
                leases[key] = leases.get(key, 0) + 1
                leased.append(expert)
        return leased

    def release(self, key: Key) -> None:
        """End one lease; ValueError where there is none."""
        if key not in self.leases:
            raise ValueError(f"expert {key} is not leased")
        self.leases[key] -= 1
        if not self.leases[key]:
            del self.leases[key]

    def release_all(self, layer: int, experts: Sequence[int]) -> list[int]:
        """End a lease of each of a layer's experts, ValueError where one has none; returns those now idle."""
        leases, idle = self.leases, []
        for expert in experts:
            key = layer, expert
            n_leases = leases.get(key, 0)
            if n_leases > 1:
                leases[key] = n_leases - 1
            elif n_leases:
                del leases[key]
                idle.append(expert)
            else:
                raise ValueError(f"expert {key} is not leased")
        return idle

    def held(self) -> set[Key]:
        """The experts that have a slot, LOADING or READY."""
        return self._loading.keys() | self.ready.keys()

    def check(self) -> None:
        """AssertionError where the books do not agree."""
        loading = [reservation.slot for reservation in self._loading.values()]
        places = sorted([*self._free, *loading, *self.ready.values()])
        assert places == list(range(self.n_slots)), "a slot is lost, or in two states"
        assert not self._loading.keys() & self.ready.keys(), "an expert is in two slots"
        assert self.leases.keys() <= self.ready.keys(), "a lease on an expert that is not ready"
        assert all(n > 0 for n in self.leases.values())
        for key, reservation in self._loading.items():
            assert reservation.key == key
            assert reservation.generation == self._generations[reservation.slot], "a copy from another generation"


class Quotas:
    """The experts that hold a slot, by layer, and how many each layer may or must keep.

    `per_layer` divides the slots equally, the remainder going to the first layers. Otherwise a layer with no more
    than `floor` slots gives none to another; a floor that all layers together could not have is lowered.
    """

    def __init__(self, n_slots: int, n_layers: int, *, per_layer: bool, floor: int = 0) -> None:
        share, rest = divmod(n_slots, n_layers)
        self.floor = 0 if per_layer else min(floor, share)
        self._n_slots = n_slots
        self._n_held = 0
        self._quotas = [share + (layer < rest) if per_layer else n_slots for layer in range(n_layers)]
        self.held: list[set[Key]] = [set() for _ in range(n_layers)]
        """By layer, its experts that hold a slot."""

    def quota(self, layer: int) -> int:
        """The most slots the layer may have."""
        return self._quotas[layer]

    def vacant(self, layer: int) -> bool:
        """Whether the layer may have one of the free slots."""
        return self._n_held < self._n_slots and len(self.held[layer]) < self._quotas[layer]

    def spares(self, layer: int) -> bool:
        """Whether the layer may lose a slot to another layer."""
        return len(self.held[layer]) > self.floor

    def enter(self, key: Key) -> None:
        """Count an expert that now holds a slot."""
        self.held[key[0]].add(key)
        self._n_held += 1

    def leave(self, key: Key) -> None:
        """Remove an expert that holds no slot any more."""
        self.held[key[0]].remove(key)
        self._n_held -= 1

    def check(self, held: set[Key]) -> None:
        """Raise `AssertionError` where this disagrees with the slots, or a layer is over its quota."""
        assert set().union(*self.held) == held
        assert self._n_held == len(held) <= self._n_slots
        for layer, keys in enumerate(self.held):
            assert all(key[0] == layer for key in keys)
            assert len(keys) <= self._quotas[layer], "a layer is over its quota"


class Staging:
    """Experts in staging slots, in the order in which they came."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.held: dict[Key, None] = {}
        """Those that hold one."""

    def oldest(self, idle: Callable[[Key], bool]) -> Key | None:
        """Return the next expert to leave once all staging slots are taken; `None` where all are leased."""
        return next((key for key in self.held if idle(key)), None)

    @property
    def vacant(self) -> bool:
        """Whether a slot is free."""
        return len(self.held) < self.n_slots

    def enter(self, key: Key) -> None:
        """Add an expert that now holds a staging slot."""
        self.held[key] = None

    def leave(self, key: Key) -> None:
        """Remove an expert that holds no staging slot any more."""
        del self.held[key]

    def check(self, held: set[Key]) -> None:
        """Raise `AssertionError` if there are more experts than staging slots, or an expert holds no slot."""
        assert len(self.held) <= self.n_slots
        assert self.held.keys() <= held


Place = tuple[float, int, int, int]
"""(worth, recency, id): the smallest is evicted first; the id keeps all places distinct."""


class Victims:
    """Owner of the list of experts that may give way: those in permanent slots that are neither loading nor leased.

    Ranks change with every visit, and few of them are ever asked for. So a visit only marks its layer as stale, and
    a question computes the least worth of the stale layers anew. `spares` says whether a layer may lose a slot to
    another.
    """

    def __init__(self, policy: Policy, spares: Callable[[int], bool]) -> None:
        n_experts = policy.history.n_experts
        self._policy = policy
        self._spares = spares
        self._may_go = [np.zeros(n, dtype=np.bool_) for n in n_experts]
        self._worth: list[NDArray[np.float64]] = [np.full(n, inf) for n in n_experts]
        """By layer, `[E]`: worth of the experts that may be evicted, infinite for the others."""
        self._least = np.full(len(n_experts), inf)
        self.stale: set[int] = set()
        """Layers whose ranks, or whose experts that may give way, are others than when they were looked at last."""

    def put(self, layer: int, experts: Iterable[int], *, may_go: bool) -> None:
        """Take note whether some of a layer's experts may give way."""
        row = self._may_go[layer]
        for expert in experts:
            row[expert] = may_go
        self.stale.add(layer)

    def worst_of(self, layer: int) -> Key | None:
        """Return the worst expert of one layer; `None` where none may give way."""
        self._freshen()
        return self._first(layer) if self._least[layer] < inf else None

    def worst(self) -> Key | None:
        """Return the worst expert of all layers that may lose a slot; `None` where there is none."""
        self._freshen()
        least = self._least
        layer = int(least.argmin())
        if not self._spares(layer):
            least = np.where([self._spares(i) for i in range(len(least))], least, inf)
            layer = int(least.argmin())
        if not least[layer] < inf:
            return None
        tied = (least == least[layer]).nonzero()[0].tolist()
        if len(tied) == 1:
            return self._first(layer)
        return min([self._first(i) for i in tied if self._spares(i)], key=self.place)

    def place(self, key: Key) -> Place:
        """Return an expert's place in the order in which experts give way."""
        layer, expert = key
        worth = self._policy.rank(key) - self._policy.level(layer)
        return worth, self._policy.history.last_visit(key), -expert, -layer

    def check(self, may_go: set[Key]) -> None:
        """Raise `AssertionError` unless these experts may give way, and the worst are those that a search finds."""
        held = {(layer, int(e)) for layer, row in enumerate(self._may_go) for e in np.flatnonzero(row)}
        assert held == may_go, "other experts may give way than are listed"
        for layer in range(len(self._may_go)):
            mine = [key for key in may_go if key[0] == layer]
            assert self.worst_of(layer) == min(mine, key=self.place, default=None), (
                f"layer {layer} has another worst"
            )
        spared = [key for key in may_go if self._spares(key[0])]
        assert self.worst() == min(spared, key=self.place, default=None), "another layer has the worst"

    def _first(self, layer: int) -> Key:
        tied = (self._worth[layer] == self._least[layer]).nonzero()[0].tolist()
        first = tied.pop()
        if tied:  # equal in worth: longest ago, then the higher number
            last_visit = self._policy.history.last_visits(layer)
            for expert in reversed(tied):
                if last_visit[expert] < last_visit[first]:
                    first = expert
        return layer, first

    def _freshen(self) -> None:
        for layer in self.stale:
            worth = self._worth[layer] = np.where(self._may_go[layer], self._policy.worths(layer), inf)
            self._least[layer] = worth[worth.argmin()]  # quicker than its minimum
        self.stale.clear()
