"""Anything that can happen to a cache, in any order: its books agree after every event."""

from collections import Counter
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cache.slots import Reservation
from fiddler.lab.policies import POLICIES, make_policy, uniform

LAYERS = (4, 3, 5)
KEYS = uniform(LAYERS)
KEY = st.sampled_from(KEYS)
ROWS = st.dictionaries(st.integers(0, 2), st.integers(1, 4), max_size=3)

SCORES = st.none() | st.lists(st.floats(0, 1), min_size=5, max_size=5)


class CacheMachine(RuleBasedStateMachine):
    """Keeps its own books of copies and leases; `check` compares the standings with a full search."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Reservation] = []
        self.ended: list[Reservation] = []
        self.leases: Counter[Key] = Counter()
        self.generations: Counter[int] = Counter()

        self.pinned: set[Key] = set()
        """Those of a static placement that have landed."""

    @initialize(
        name=st.sampled_from(sorted(POLICIES)),
        n_kept=st.integers(0, 9),
        n_staging=st.integers(0, 3),
        floor=st.integers(0, 3),
        admission=st.sampled_from([1.0, 4.0, inf]),
    )
    def open(self, name: str, n_kept: int, n_staging: int, floor: int, admission: float) -> None:
        self.floor = min(floor, n_kept // len(LAYERS))
        self.order = KEYS[:n_kept] if name == "static" else ()
        self.cache = ExpertCache(
            n_kept + n_staging,
            LAYERS,
            make_policy(name, LAYERS, half_life=3),
            floor=floor,
            admission=admission,
            n_staging=n_staging,
        )

    def absent(self, key: Key) -> bool:
        assert self.cache.holds(key) is (self.cache.slot(key) is not None or self.cache.loading(key) is not None)
        return not self.cache.holds(key)

    def passing(self) -> set[Key]:
        """Those that hold a slot in passing."""
        return {key for key in KEYS if key in self.cache._staging.held}

    def n_kept(self, layer: int) -> int:
        return sum(key[0] == layer and not self.absent(key) and key not in self.passing() for key in KEYS)

    @rule(layer=st.integers(0, 2), rows=ROWS, n_extra=st.integers(0, 3), scores=SCORES)
    def observe(self, layer: int, rows: dict[int, int], n_extra: int, scores: list[float] | None) -> None:
        known = None if scores is None else scores[: LAYERS[layer]]
        self.cache.observe(layer, sorted(rows.items()), max(1, *rows.values(), 0) + n_extra, known)

    @rule(key=KEY, promotion=st.booleans())
    def reserve(self, key: Key, promotion: bool) -> None:
        if not self.absent(key):
            return
        passing = self.passing()
        reservation = self.cache.reserve(key, promotion=promotion)
        if reservation is not None:
            self.started(reservation, passing)
            assert not promotion or key not in self.passing(), "a promotion is for good"

    @rule()
    def promote(self) -> None:
        found = self.cache.promotion(KEYS)
        if found is not None:
            key, _ = found
            passing = self.passing()
            reservation = self.cache.reserve(key, promotion=True)
            assert reservation is not None
            self.started(reservation, passing)

    def started(self, reservation: Reservation, passing: set[Key]) -> None:
        """A copy was begun; `passing` is who was in passing before."""
        victim, slot = reservation.victim, reservation.slot
        assert reservation.generation > self.generations[slot]
        self.generations[slot] = reservation.generation
        self.copies.append(reservation)
        if victim is not None:
            assert not self.leases[victim]
            assert self.absent(victim)
            assert (victim in passing) is (reservation.key in self.passing()), "a newcomer takes a slot of its kind"
            if victim[0] != reservation.key[0] and victim not in passing:
                assert self.n_kept(victim[0]) >= self.floor
                assert not self.cache.policy.per_layer

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), fails=st.booleans())
    def end_copy(self, data: st.DataObject, fails: bool) -> None:
        copy = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
        assert self.cache.loading(copy.key) == copy
        (self.cache.failed if fails else self.cache.landed)(copy)
        assert self.cache.slot(copy.key) == (None if fails else copy.slot)

    @rule(key=KEY)
    def lease(self, key: Key) -> None:
        if self.cache.slot(key) is not None:
            assert self.cache.lease(key) == self.cache.slot(key)
            self.leases[key] += 1

    @rule(key=KEY)
    def release(self, key: Key) -> None:
        if not self.leases[key]:
            return
        slots = {other: slot for other in KEYS if (slot := self.cache.slot(other)) is not None}
        used = key in self.passing() and self.leases[key] == 1
        self.cache.release(key)
        self.leases[key] -= 1
        gone = {other for other in slots if self.cache.slot(other) != slots[other]}
        if not used:
            assert not gone
        elif self.cache.slot(key) is None:
            assert gone == {key}
        else:
            assert key not in self.passing(), "it stays for good, where it is"
            assert all(self.cache.score(other) < self.cache.score(key) for other in gone)
            assert len(gone) <= 1
            assert all(not self.leases[other] for other in gone)

    @rule()
    def save_and_restore(self) -> None:
        state = self.cache.state()
        self.cache.restore(state)
        assert self.cache.state() == state

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            assert self.cache.n_free + self.cache.n_ready + len(self.copies) == self.cache.n_slots
            assert all(self.cache.slot(key) is not None for key, n in self.leases.items() if n)
            assert len(self.passing()) <= self.cache._staging.n_slots
            assert all(self.cache.slot(key) is not None for key in self.pinned), "a pinned expert left"
            self.pinned |= {key for key in self.order if self.cache.slot(key) is not None}


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("floor", [0, 2])
def test_every_victim_of_a_long_run_is_the_worst_there_is(name: str, floor: int) -> None:
    layers = (9, 6, 9)
    chance = Random(f"{name} {floor}")
    cache = ExpertCache(12, layers, make_policy(name, layers, half_life=5), floor=floor, admission=10.0)
    for visit in range(600):
        layer = visit % 3
        experts = sorted(chance.sample(range(layers[layer]), chance.randint(1, 3)))
        scores = [chance.random() ** 4 for _ in range(layers[layer])]
        cache.observe(layer, [(expert, chance.randint(1, 2)) for expert in experts], chance.randint(2, 9), scores)
        for key in ((layer, expert) for expert in experts):
            resident = {other: cache.score(other) for other in uniform(layers) if cache.slot(other) is not None}
            held = Counter(other[0] for other in resident)
            if key in resident or (reservation := cache.reserve(key)) is None:
                continue
            cache.landed(reservation)
            allowed = (
                {key[0]} if cache.policy.per_layer else {key[0], *(layer for layer in held if held[layer] > floor)}
            )
            if reservation.victim is not None:
                worst = min(score for other, score in resident.items() if other[0] in allowed)
                assert resident[reservation.victim] <= worst * (1 + 1e-9)
        if visit % 7 == 0:
            cache.check()


EVENTS = st.lists(st.tuples(st.integers(0, 2), ROWS.filter(bool)), max_size=30)


def serve(cache: ExpertCache, events: list[tuple[int, dict[int, int]]]) -> list[Reservation | None]:
    """Observe each visit and fetch whatever is let in."""
    answers: list[Reservation | None] = []
    for layer, rows in events:
        cache.observe(layer, sorted(rows.items()), max(rows.values()))
        for expert in sorted(rows):
            if cache.slot((layer, expert)) is None:
                answers.append(cache.reserve((layer, expert)))
                if answers[-1] is not None:
                    cache.landed(answers[-1])
    return answers


@given(name=st.sampled_from(sorted(POLICIES)), n_slots=st.integers(1, 8), events=EVENTS)
@settings(deadline=None)
def test_runs_repeat(name: str, n_slots: int, events: list[tuple[int, dict[int, int]]]) -> None:
    runs = [serve(ExpertCache(n_slots, LAYERS, make_policy(name, LAYERS)), events) for _ in range(2)]
    assert runs[0] == runs[1]


@given(name=st.sampled_from(sorted(POLICIES)), n_slots=st.integers(1, 8), before=EVENTS, after=EVENTS)
@settings(deadline=None)
def test_a_restored_cache_names_the_same_victims(
    name: str, n_slots: int, before: list[tuple[int, dict[int, int]]], after: list[tuple[int, dict[int, int]]]
) -> None:
    learned = ExpertCache(0, LAYERS, make_policy(name, LAYERS))
    serve(learned, before)
    answers = []
    for _ in range(2):
        cache = ExpertCache(n_slots, LAYERS, make_policy(name, LAYERS))
        cache.restore(learned.state())
        for reservation in cache.fill(cache.best(n_slots)):
            cache.landed(reservation)
        answers.append(serve(cache, after))
    unbroken = ExpertCache(n_slots, LAYERS, make_policy(name, LAYERS))
    for layer, rows in before:
        unbroken.observe(layer, sorted(rows.items()), max(rows.values()))
    for reservation in unbroken.fill(unbroken.best(n_slots)):
        unbroken.landed(reservation)
    assert answers == [serve(unbroken, after)] * 2
