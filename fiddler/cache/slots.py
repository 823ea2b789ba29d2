"""Slots of the accelerator's expert memory: their states, quotas by layer, and staging slots.

`Slots` takes each slot through FREE → LOADING → READY and counts leases, which pin it. `Room` says which layer may
take a slot from which: a quota per layer, or one pool in which every layer keeps a floor. `Staging` lists experts
that hold a slot only until the next one needs it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fiddler.cache.policy import Key


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


class Room:
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
