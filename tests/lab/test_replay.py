"""Replays by hand, and the bound that nobody beats."""

from itertools import combinations
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.cache.policies import Lfu
from fiddler.cache.policy import Key, Visit
from fiddler.lab.policies import POLICIES, make_policy
from fiddler.lab.replay import Replay, belady, replay

LAYERS = (4, 4)


def visits(*sets: str) -> list[Visit]:
    """One layer, one token a visit; each letter an expert."""
    return [(0, tuple((ord(letter) - ord("a"), 1) for letter in sorted(letters)), 1) for letters in sets]


@st.composite
def traces(draw: st.DrawFn, n_most: int = 24) -> list[Visit]:
    trace: list[Visit] = []
    for number in range(draw(st.integers(0, n_most))):
        experts = draw(st.dictionaries(st.integers(0, 3), st.integers(1, 3), max_size=3))
        trace.append((number % 2, tuple(sorted(experts.items())), max([1, *experts.values()])))
    return trace


def test_lru_by_hand() -> None:
    trace = visits("a", "b", "c", "a", "b", "b")
    assert replay(trace, make_policy("lru", (3,)), 2) == Replay(n_hits=1, n_misses=5, n_tokens=6)
    assert replay(trace, make_policy("lru", (3,)), 3) == Replay(n_hits=3, n_misses=3, n_tokens=6)


def test_belady_by_hand() -> None:
    trace = visits("a", "b", "c", "a", "b", "b")
    assert belady(trace, 2) == Replay(n_hits=3, n_misses=3, n_tokens=6), "c is not kept"
    assert belady(trace, 1) == Replay(n_hits=2, n_misses=4, n_tokens=6), "a, then b"
    assert belady(trace, 0) == Replay(n_hits=0, n_misses=6, n_tokens=6)


def test_experts_of_a_visit_do_not_evict_each_other() -> None:
    trace = visits("abc", "ab")
    assert replay(trace, make_policy("lru", (3,)), 2) == Replay(n_hits=2, n_misses=3, n_tokens=2), "c found no slot"


def test_a_static_placement_misses_each_expert_once_at_most() -> None:
    trace = visits("a", "b", "c", "a", "b", "c")
    assert replay(trace, make_policy("static", (3,), order=[(0, 2), (0, 1)]), 2) == Replay(2, 4, 6)


def test_tokens_are_counted_once_for_all_layers() -> None:
    trace: list[Visit] = [(0, ((0, 5),), 5), (1, ((1, 5),), 5), (0, ((0, 1),), 1)]
    assert replay(trace, make_policy("lru", LAYERS), 2).n_tokens == belady(trace, 2).n_tokens == 6
    assert belady([], 2) == Replay(0, 0, 0)


def test_a_newcomer_worth_less_may_be_refused() -> None:
    trace = visits("a", "a", "a", "b", "b", "b")

    def n_hits(admission: float) -> int:
        return replay(trace, make_policy("lfu", (2,)), 1, admission=admission).n_hits

    assert n_hits(inf) == 4, "b is let in at once"
    assert n_hits(2.0) == 3, "with half as many visits"
    assert n_hits(1.0) == 2, "with as many"


def test_a_policy_says_whether_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = visits("a", "a", "b", "a", "b", "a")
    assert replay(trace, make_policy("lfu", (2,)), 1) == Replay(1, 5, 6)
    monkeypatch.setattr(Lfu, "bypasses", True)
    assert replay(trace, make_policy("lfu", (2,)), 1) == Replay(3, 3, 6)
    assert replay(trace, make_policy("lfu", (2,)), 1, admission=inf) == Replay(1, 5, 6)


def test_of_what_is_missing_the_best_is_let_in() -> None:
    trace = visits("c", "c", "bc", "abc", "b")
    assert replay(trace, make_policy("lfu", (3,)), 2, admission=1.0) == Replay(n_hits=5, n_misses=3, n_tokens=5)


def test_rates() -> None:
    assert (Replay(3, 1, 2).hit_rate, Replay(3, 1, 2).reads_per_token) == (0.75, 0.5)
    assert (Replay(0, 0, 0).hit_rate, Replay(0, 0, 0).reads_per_token) == (1.0, 0.0)


@pytest.mark.parametrize("name", POLICIES)
@given(
    trace=traces(),
    n_slots=st.integers(0, 8),
    floor=st.integers(0, 2),
    admission=st.sampled_from([None, 1.0, inf]),
)
@settings(deadline=None)
def test_nobody_beats_belady(
    name: str, trace: list[Visit], n_slots: int, floor: int, admission: float | None
) -> None:
    policy = make_policy(name, LAYERS, half_life=4)
    played, bound = replay(trace, policy, n_slots, floor, admission=admission), belady(trace, n_slots)
    assert played.n_hits <= bound.n_hits
    assert played.n_hits + played.n_misses == bound.n_hits + bound.n_misses
    assert played.n_tokens == bound.n_tokens


def best_possible(trace: list[Visit], n_slots: int) -> int:
    """The most hits that any choice of what to keep can have, by trying all."""
    states: dict[frozenset[Key], int] = {frozenset(): 0}
    for layer, rows, _ in trace:
        used = {(layer, expert) for expert, _ in rows}
        following: dict[frozenset[Key], int] = {}
        for kept, n_hits in states.items():
            there = sorted(kept | used)
            for choice in combinations(there, min(n_slots, len(there))):
                following[frozenset(choice)] = max(following.get(frozenset(choice), 0), n_hits + len(kept & used))
        states = following
    return max(states.values())


@given(trace=traces().map(lambda trace: trace[:9]), n_slots=st.integers(0, 4))
@settings(deadline=None, max_examples=60)
def test_belady_is_the_best_that_can_be_done(trace: list[Visit], n_slots: int) -> None:
    assert belady(trace, n_slots).n_hits == best_possible(trace, n_slots)
