"""The expert cache: reserves slots for experts, evicts the one worth least, and keeps scores between runs.

It combines three owners: `Slots` (a slot's state), `Quotas` (which layer may take a slot) and `Victims` (who gives
way). `state` and `restore` save and load what the policy and its history have learned.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from fiddler.cache.policy import Key, Policy, Rows, counts, part, text
from fiddler.cache.slots import Place, Quotas, Reservation, Slots, Staging, Victims
from fiddler.given import shown


class ExpertCache:
    """Slots, and the policy that says which experts deserve them.

    An expert is absent, LOADING (reserved) or READY. Neither LOADING nor leased experts are ever victims, so lease
    a step's hits before asking for room. A demand evicts a victim worth up to `admission` times the newcomer, a
    promotion only one that is worth less. `floor` is a quarter of an even share unless given.

    The worst expert is the one of lowest worth; ties go to the one touched longest ago, then to the higher expert
    number, then to the higher layer (so unknown experts fill the layers evenly).

    `n_staging` slots hold experts that were refused a permanent slot. If one turns out to be worth more than a
    resident after use, they swap places without copying.
    """

    def __init__(
        self,
        n_slots: int,
        n_experts: tuple[int, ...],
        policy: Policy,
        *,
        floor: int | None = None,
        admission: float = 4.0,
        n_staging: int = 0,
    ) -> None:
        n_kept = n_slots - n_staging
        floor = n_kept // (4 * len(n_experts)) if floor is None else floor
        if policy.history.n_experts != n_experts:
            raise ValueError(f"the policy knows layers of {policy.history.n_experts} experts, not {n_experts}")
        if not 0 <= n_staging <= n_slots or floor < 0 or not admission >= 1:
            raise ValueError("n_staging is within n_slots, floor is not negative, admission is at least 1")
        self.policy = policy
        self.history = policy.history
        self.score = policy.score
        """What the policy says that an expert is worth now."""
        self._admission = admission
        self._floor = floor
        self._keys = [[(layer, expert) for expert in range(n)] for layer, n in enumerate(n_experts)]
        self._begin(n_slots, n_staging)

    def shrink(self, n_slots: int) -> None:
        """Have fewer slots, all of them free; scores stay. Raises `ValueError` while one is LOADING or leased."""
        if any(not self._slots.idle(key) for key in self._slots.held()):
            raise ValueError("experts are loading, or leased")
        self._begin(n_slots, min(self._staging.n_slots, n_slots))

    def _begin(self, n_slots: int, n_staging: int) -> None:
        self.n_slots = n_slots
        """Slots altogether."""
        self._n_kept = n_slots - n_staging
        self._slots = Slots(n_slots)
        self.ready: Mapping[Key, int] = self._slots.ready
        """The slot of each expert that is READY."""
        self._quotas = Quotas(self._n_kept, len(self._keys), per_layer=self.policy.per_layer, floor=self._floor)
        self._staging = Staging(n_staging)
        self._victims = Victims(self.policy, self._quotas.spares)

    @property
    def n_free(self) -> int:
        """Slots that hold nothing."""
        return self._slots.n_free

    @property
    def n_ready(self) -> int:
        """Slots whose expert can be used."""
        return self._slots.n_ready

    def observe(self, layer: int, rows: Rows, n_tokens: int, scores: Sequence[float] | None = None) -> None:
        """Learn from one layer of one step: (expert, n_rows) of the `n_tokens` tokens that passed it.

        `scores`, where known: the router's probability of each of the layer's experts, summed over the tokens.
        ValueError where no token passed.
        """
        self.history.observe(layer, rows, n_tokens)
        self.policy.observe(layer, rows, n_tokens, scores)
        self._victims.stale.add(layer)

    def slot(self, key: Key) -> int | None:
        """Return the READY slot of an expert."""
        return self.ready.get(key)

    def holds(self, key: Key) -> bool:
        """Whether the expert has a slot, LOADING or READY."""
        return key in self._quotas.held[key[0]] or key in self._staging.held

    def held(self, layer: int) -> tuple[Collection[Key], Collection[Key]]:
        """The layer's experts that have a slot to keep, LOADING or READY, and those of all layers in passing."""
        return self._quotas.held[layer], self._staging.held

    def loading(self, key: Key) -> Reservation | None:
        """Return the copy under way for an expert."""
        return self._slots.loading(key)

    def reserve(self, key: Key, *, promotion: bool = False) -> Reservation | None:
        """Return a slot for an absent expert: a free one, the worst expert's, or a staging slot; `None` if it is
        refused.

        Raises `ValueError` where the expert is not absent.
        """
        admitted, victim = self._admitted(key, promotion=promotion)
        if admitted:
            self._replace(victim, key)
            return self._slots.begin(key, victim)
        return None if promotion else self.stage(key)

    def stage(self, key: Key) -> Reservation | None:
        """Return a staging slot for an absent expert; `None` where all are in use."""
        victim = None
        if not self._staging.vacant:
            victim = self._staging.oldest(self._slots.idle)
            if victim is None:
                return None
            self._staging.leave(victim)
        self._staging.enter(key)
        return self._slots.begin(key, victim)

    def landed(self, reservation: Reservation) -> None:
        """LOADING → READY; ValueError for a stale reservation."""
        self._slots.landed(reservation)
        self._place(reservation.key)

    def failed(self, reservation: Reservation) -> None:
        """LOADING → absent, its slot free; ValueError for a stale reservation."""
        self._slots.failed(reservation)
        if reservation.key in self._staging.held:
            self._staging.leave(reservation.key)
        else:
            self._replace(reservation.key, None)

    def lease(self, key: Key) -> int:
        """Pin a READY expert while it is used, and say in which slot it is; ValueError where it is not READY."""
        slot = self._slots.lease(key)
        self._place(key)
        return slot

    def release(self, key: Key) -> None:
        """End one lease; ValueError where there is none."""
        self._slots.release(key)
        if key in self._staging.held and self._slots.idle(key):
            self._pass_on(key)
        self._place(key)

    def lease_ready(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Lease those of a layer's experts that are READY, and return them."""
        leased = self._slots.lease_ready(layer, experts)
        if leased:
            self._victims.put(layer, leased, may_go=False)
        return leased

    def release_all(self, layer: int, experts: Sequence[int]) -> None:
        """End a lease of each of a layer's experts; ValueError where there is none."""
        staged = self._staging.held
        kept: list[int] = []
        for expert in experts:
            if (layer, expert) in staged:  # whether it stays is decided with those before it let go
                self._victims.put(layer, self._slots.release_all(layer, kept), may_go=True)
                kept = []
                self.release((layer, expert))
            else:
                kept.append(expert)
        self._victims.put(layer, self._slots.release_all(layer, kept), may_go=True)

    def promotion(self, keys: Sequence[Key]) -> tuple[Key, float] | None:
        """Return a reservation for the one of these absent experts that is most worth copying in, and its gain.

        `reserve(key, promotion=True)` takes the expert. The gain is how many more visits a token it expects than
        its victim. `None` where even the best is worth nothing or does not beat its victim.
        """
        absent = []
        for key in keys:
            if not self.holds(key) and self.policy.admits(key, self._n_kept):
                absent.append(key)
        if not absent:
            return None
        best = min(absent, key=self._highest)
        if self.policy.score(best) <= 0:
            return None
        rate = self.policy.rate(best)
        if self._quotas.vacant(best[0]):
            return best, rate
        victim = self._gives_way(best, promotion=True)
        return None if victim is None else (best, rate - self.policy.rate(victim))

    def fill(self, keys: Sequence[Key]) -> list[Reservation]:
        """Reserve free slots for absent experts, in this order, before the first request."""
        reservations = []
        for key in keys:
            if not self.holds(key) and self.policy.admits(key, self._n_kept) and self._quotas.vacant(key[0]):
                self._replace(None, key)
                reservations.append(self._slots.begin(key))
        return reservations

    def best(self, n: int) -> list[Key]:
        """Return the `n` experts of highest worth that may be resident together, best first."""
        chosen: list[Key] = []
        left = [self._quotas.quota(layer) for layer in range(len(self._keys))]
        for key in sorted((key for keys in self._keys for key in keys), key=self._highest):
            if len(chosen) < n and left[key[0]] and self.policy.admits(key, self._n_kept):
                left[key[0]] -= 1
                chosen.append(key)
        return chosen

    def state(self) -> dict[str, object]:
        """Return the learned scores, JSON-able; not which experts are resident."""
        return {
            "policy": self.policy.name,
            "n_experts": [list(self.history.n_experts)],
            "history": self.history.state(),
            "worth": self.policy.state(),
        }

    def restore(self, saved: Mapping[str, object]) -> None:
        """Load what `state` returned; raises `ValueError`, with nothing changed, for another policy or model."""
        saved = part({"state": saved}, "state")
        shape = self.history.n_experts
        found = text(saved, "policy"), counts(saved, "n_experts", [len(shape)])
        if found != (self.policy.name, [list(shape)]):
            raise ValueError(f"the saved state is of {shown(found)}, not of this policy and model")
        before = self.history.state()
        try:
            self.history.restore(part(saved, "history"))
            self.policy.restore(part(saved, "worth"))
        except ValueError:
            self.history.restore(before)
            raise
        self._victims.stale.update(range(len(self._keys)))

    def check(self) -> None:
        """Raise `AssertionError` where the books do not agree, or the worst expert differs from a full search's."""
        self._slots.check()
        held = self._slots.held()
        self._staging.check(held)
        self._quotas.check({key for key in held if key not in self._staging.held})
        self._victims.check({key for key in held if key not in self._staging.held and self._slots.idle(key)})

    def _admitted(self, key: Key, *, promotion: bool = False) -> tuple[bool, Key | None]:
        """Return whether an absent expert may stay, and the victim if no slot is free."""
        if self.holds(key):
            raise ValueError(f"expert {key} has a slot already")
        if not self.policy.admits(key, self._n_kept):
            return False, None
        if self._quotas.vacant(key[0]):
            return True, None
        victim = self._gives_way(key, promotion=promotion)
        return victim is not None, victim

    def _pass_on(self, key: Key) -> None:
        """Swap a staged expert after use with a resident that is worth less; the loser is evicted."""
        leaving: Key | None = key
        if self.policy.admits(key, self._n_kept):
            victim = None if self._quotas.vacant(key[0]) else self._victim(key)
            if self._quotas.vacant(key[0]) or (
                victim is not None and self.policy.score(victim) < self.policy.score(key)
            ):
                self._replace(victim, key)
                leaving = victim
        self._staging.leave(key)
        if leaving is not None:
            self._slots.evict(leaving)

    def _replace(self, leaving: Key | None, entering: Key | None) -> None:
        if leaving is not None:
            self._quotas.leave(leaving)
            self._victims.put(leaving[0], (leaving[1],), may_go=False)
        if entering is not None:  # which may not give way: its copy is yet to land, or its place to be told
            self._quotas.enter(entering)

    def _place(self, key: Key) -> None:
        """Tell the victims' list whether an expert may be evicted."""
        layer, slots = key[0], self._slots
        may_go = key in slots.ready and key not in slots.leases and key in self._quotas.held[layer]
        self._victims.put(layer, (key[1],), may_go=may_go)

    def _victim(self, newcomer: Key) -> Key | None:
        """The worst expert that may give way: of its own layer always, of others while they spare a slot."""
        layer = newcomer[0]
        if self.policy.per_layer:
            return self._victims.worst_of(layer)
        worst = self._victims.worst()
        if self._quotas.spares(layer):
            return worst
        firsts = [key for key in (self._victims.worst_of(layer), worst) if key is not None]
        return min(firsts, key=self._victims.place, default=None)

    def _gives_way(self, newcomer: Key, *, promotion: bool = False) -> Key | None:
        victim = self._victim(newcomer)
        if victim is None:
            return None
        new, old = self.policy.score(newcomer), self.policy.score(victim)
        refused = new <= old if promotion else old > self._admission * new
        return None if refused else victim

    def _highest(self, key: Key) -> Place:
        worth = self.policy.level(key[0]) - self.policy.rank(key)
        return worth, -self.history.last_visit(key), key[1], key[0]
