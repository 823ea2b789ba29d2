"""Foresight: by hand, against the same rule in the plainest words, and between guessing and Belady."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.cache.policies import AgedLfu
from fiddler.cache.policy import History, Key, Visit
from fiddler.lab.policies import POLICIES, make_policy
from fiddler.lab.replay import BELADY, BOUNDS, FORESIGHTS, Foresight, Replay, belady, compare, replay
from fiddler.lab.synthetic import SyntheticRouting
from fiddler.recording import Recording, visits
from tests.lab.test_replay import LAYERS, traces
from tests.lab.test_replay import visits as letters

HALF_LIFE = 3.7
"""No sum of counts is another by chance."""


def in_plain_words(trace: list[Visit], n_slots: int, n_tokens: float) -> int:
    """The misses of the same rule, which looks through the trace at every choice."""
    history = History(LAYERS)
    counts = AgedLfu(history, HALF_LIFE)
    kept: set[Key] = set()
    n_misses = 0
    for number, (layer, rows, n) in enumerate(trace):
        history.observe(layer, rows, n)
        counts.observe(layer, rows, n)
        used = {(layer, expert) for expert, _ in rows}
        n_misses += len(used - kept)
        kept |= used
        horizon = history.n_tokens + n_tokens
        standing = {}
        for key in kept:
            use = next_use(trace, number, key)
            token = inf if use == inf else sum(n for at, _, n in trace[: int(use)] if at == key[0])
            known = token < horizon
            standing[key] = (known, -use if known else counts.rank(key), history.last_visit(key), key)
        kept = set(sorted(kept, key=standing.__getitem__)[max(len(kept) - n_slots, 0) :])
    return n_misses


def next_use(trace: list[Visit], number: int, key: Key) -> float:
    later = range(number + 1, len(trace))
    return next((i for i in later if trace[i][0] == key[0] and key[1] in dict(trace[i][1])), inf)


def test_by_hand() -> None:
    trace = letters("a", "b", "c", "a", "b", "b")
    foresight = Foresight(trace)
    assert foresight.replay(2, 1) == Replay(n_hits=2, n_misses=4, n_tokens=6), "c is kept, b is not known of"
    assert foresight.replay(2, 2) == belady(trace, 2) == Replay(n_hits=3, n_misses=3, n_tokens=6)
    assert foresight.replay(0, 3) == Replay(0, 6, 6)
    assert Foresight([]).replay(2, 3) == Replay(0, 0, 0)


def test_of_its_own_step_it_knows_the_later_layers() -> None:
    token: list[Visit] = [(0, ((0, 1),), 1), (1, ((0, 1),), 1)]
    other: list[Visit] = [(0, ((1, 1),), 1), (1, ((0, 1),), 1)]
    trace = [*token, *other]
    assert Foresight(trace).replay(1, 1).n_hits == 1, "layer 1's expert is kept, for layer 0's is needed no more"
    assert Foresight(trace).replay(1, 0).n_hits == 1, "in layer 0 of the second step its own layer 1 is known"


def test_a_chunk_is_known_from_its_first_token_on() -> None:
    trace: list[Visit] = [(0, ((0, 1), (1, 1)), 1), (0, ((2, 1),), 1), (0, ((0, 300), (1, 9)), 300)]
    assert Foresight(trace).replay(2, 1).n_hits == 2, "the chunk is next when 2 asks to be kept"


def test_more_foresight_may_be_worse_for_once() -> None:
    trace = letters("ab", "c", "a", "bc", "bc", "ab", "b", "ab", "ac", "a", "a", "ac")
    misses = [Foresight(trace).replay(2, n).n_misses for n in (0, 1, 2, 3)]
    assert misses == [9, 6, 7, 6]
    assert belady(trace, 2).n_misses == 6


@given(trace=traces(n_most=40), n_slots=st.integers(0, 8), n_tokens=st.sampled_from([0, 1, 2, 3, 5, 9, inf]))
@settings(deadline=None)
def test_it_does_what_it_says_and_no_better_than_belady(trace: list[Visit], n_slots: int, n_tokens: float) -> None:
    played = Foresight(trace, HALF_LIFE).replay(n_slots, n_tokens)
    assert played.n_misses == in_plain_words(trace, n_slots, n_tokens)
    assert played.n_misses >= belady(trace, n_slots).n_misses
    assert played.n_tokens == belady(trace, n_slots).n_tokens


@given(trace=traces(n_most=60), n_slots=st.integers(0, 8))
@settings(deadline=None)
def test_of_the_whole_trace_it_is_belady(trace: list[Visit], n_slots: int) -> None:
    n_tokens = sum(n for _, _, n in trace)
    foresight = Foresight(trace)
    assert foresight.replay(n_slots, inf) == foresight.replay(n_slots, n_tokens) == belady(trace, n_slots)


def test_policies_side_by_side() -> None:
    routing = SyntheticRouting(3, 16, 4).sequence(0, 60)
    trace = list(visits([Recording("", 20, routing)], chunk_tokens=8))
    made = {name: lambda name=name: make_policy(name, (16,) * 3) for name in POLICIES}

    scores = list(compare(trace, made, [6, 12]))

    assert [score.policy for score in scores] == 2 * [BELADY, *BOUNDS[:-1], *POLICIES]
    for score in scores:
        assert score.knows == (score.policy in BOUNDS)
        bound = belady(trace, score.n_slots)
        assert score.ratio == score.replay.n_misses / bound.n_misses >= 1.0
        if score.policy in POLICIES:
            assert score.replay == replay(trace, made[score.policy](), score.n_slots)
    ratios = {(score.policy, score.n_slots): score.ratio for score in scores}
    for n_slots in (6, 12):
        series = [ratios[f"foresight {n}", n_slots] for n in reversed(FORESIGHTS)]
        assert 1.0 == ratios[BELADY, n_slots] <= series[0] <= series[1] <= series[2] < ratios["lru", n_slots]


@pytest.mark.parametrize("n_slots", [0, 3])
def test_where_nothing_is_read_nobody_reads_more(n_slots: int) -> None:
    scores = list(compare([(0, (), 1)], {"lru": lambda: make_policy("lru", (3,))}, [n_slots]))
    assert {score.ratio for score in scores} == {1.0}
