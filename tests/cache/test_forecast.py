"""The policy that learns what to expect: what it estimates, how it orders, and that it goes on where it stopped."""

import json
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cache.policies import HALF_LIVES, Forecast, Regression
from fiddler.cache.policy import History, Rows
from fiddler.lab.policies import make_policy
from fiddler.lab.replay import replay
from fiddler.lab.synthetic import Habits, SyntheticRouting
from fiddler.recording import Recording, visits

LAYERS = (3, 4)
KEYS = [(layer, expert) for layer, n in enumerate(LAYERS) for expert in range(n)]

Visits = list[tuple[int, Rows, int]]


@st.composite
def some_visits(draw: st.DrawFn) -> Visits:
    made: Visits = []
    for _ in range(draw(st.integers(0, 40))):
        layer = draw(st.integers(0, 1))
        rows = draw(st.dictionaries(st.integers(0, LAYERS[layer] - 1), st.integers(1, 512), max_size=3))
        made.append((layer, tuple(sorted(rows.items())), max([1, *rows.values()])))
    return made


def after(made: Visits, policy: Forecast | None = None) -> Forecast:
    policy = policy or Forecast(History(LAYERS))
    for layer, rows, n_tokens in made:
        policy.history.observe(layer, rows, n_tokens)
        policy.observe(layer, rows, n_tokens)
    return policy


def saved(policy: Forecast) -> dict[str, dict[str, object]]:
    state = {"history": policy.history.state(), "worth": policy.state()}
    loaded: dict[str, dict[str, object]] = json.loads(json.dumps(state, allow_nan=False))
    return loaded


def restored(state: dict[str, dict[str, object]]) -> Forecast:
    policy = Forecast(History(LAYERS))
    policy.history.restore(state["history"])
    policy.restore(state["worth"])
    return policy


@given(made=some_visits())
def test_scores_are_in_the_order_of_rank_less_level(made: Visits) -> None:
    policy = after(made)
    by_rank = sorted(KEYS, key=lambda key: policy.rank(key) - policy.level(key[0]))

    scores = [policy.score(key) for key in by_rank]

    # two ranks so close that their sums with a visit number round alike may change places
    assert all(one <= next_one * (1 + 1e-9) for one, next_one in pairwise(scores))
    assert all(0 < score < math.inf for score in scores)


@given(made=some_visits(), layer=st.integers(0, 1))
def test_a_visit_moves_ranks_and_level_of_its_own_layer_only(made: Visits, layer: int) -> None:
    policy = after(made)
    other = 1 - layer
    before = [policy.rank((other, expert)) for expert in range(LAYERS[other])], policy.level(other)

    after([(layer, ((0, 1),), 1)], policy)

    assert ([policy.rank((other, expert)) for expert in range(LAYERS[other])], policy.level(other)) == before


@given(made=some_visits(), more=some_visits())
def test_what_was_saved_goes_on_as_if_it_had_never_stopped(made: Visits, more: Visits) -> None:
    policy = after(made)
    again = restored(saved(policy))

    for one in (policy, again):
        after(more, one)

    assert [again.rank(key) for key in KEYS] == [policy.rank(key) for key in KEYS]
    assert [again.score(key) for key in KEYS] == [policy.score(key) for key in KEYS]
    assert saved(again) == saved(policy)


def test_an_expert_of_every_token_is_expected_with_the_next_round() -> None:
    policy = after([(layer, ((1, 1),), 1) for _ in range(100) for layer in (0, 1)])

    assert -policy.rank((0, 1)) == pytest.approx(2, rel=0.05), "visits from one of its layer's to the next"
    assert policy.score((1, 1)) == pytest.approx(1, rel=0.05), "rounds"
    assert policy.score((0, 1)) > 10 * policy.score((0, 0))


def test_of_two_alike_the_one_whose_layer_comes_next_counts_more() -> None:
    policy = after([(layer, ((0, 1),), 1) for token in range(50) for layer in (0, 1)])

    assert policy.score((0, 0)) > policy.score((1, 0)), "layer 1 has just been passed"


def test_one_that_is_overdue_counts_ever_more() -> None:
    policy = after([(layer, ((0, 1),), 1) for token in range(50) for layer in (0, 1)])
    scores = [policy.score((1, 0))]
    for _ in range(4):
        after([(0, ((0, 1),), 1)], policy)
        scores.append(policy.score((1, 0)))

    assert all(one < later for one, later in pairwise(scores))


def test_a_prompt_is_an_estimate_at_once() -> None:
    policy = after([(0, ((0, 256), (1, 128), (2, 128)), 256)])

    chances = [2 / -policy.rank((0, expert)) for expert in range(3)]

    # the prior weights of a share sum up to 0.9
    assert chances == pytest.approx([0.9, 0.45, 0.45])


def test_recurring_experts_teach_it_to_look_at_the_last_token_and_popular_ones_at_all() -> None:
    def weights(habits: Habits) -> list[float]:
        routing = SyntheticRouting(8, 32, 4, habits, 1).sequence(0, 200)
        policy = Forecast(History((32,) * 8))
        after([(layer, rows, n) for layer, rows, n in visits([Recording("", 0, routing)])], policy)
        (learnt,) = np.array(policy.state()["fit"]["weights"])  # type: ignore[index,call-overload]
        return list(learnt[1:])

    recurring = weights(Habits(skew=0.0, topic=0.0, recurrence=3.0, drift=0.0))
    popular = weights(Habits(skew=1.5, topic=0.0, recurrence=0.0, drift=0.0))

    assert len(recurring) == len(HALF_LIVES)
    assert recurring[0] > 0.4 > 0.1 > popular[0]
    assert sum(popular[3:]) > 0.6


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("recurrence", [0.0, 1.5])
def test_it_reads_fewer_experts_than_the_others(share: float, recurrence: float) -> None:
    habits = Habits(skew=0.4, topic=0.8, recurrence=recurrence, drift=0.01)
    routing = SyntheticRouting(8, 32, 4, habits, 3)
    trace = list(visits([Recording("", 0, routing.sequence(number, 150)) for number in range(2)]))

    def misses(name: str) -> int:
        return replay(trace, make_policy(name, (32,) * 8, half_life=16), int(share * 256)).n_misses

    assert misses("forecast") < min(misses("lru"), misses("lfu"), misses("aged-lfu"), misses("lfru"))


def first(rows: object) -> list[object]:
    row: list[object] = rows[0]  # type: ignore[index]
    return row


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("shares"),
        lambda state: first(state["shares"]).__setitem__(0, 1.5),
        lambda state: first(state["tokens"]).__setitem__(0, -1.0),
        lambda state: first(state["ranks"]).__setitem__(0, -1.0),
        lambda state: first(state["ranks"]).__setitem__(0, -1e15),
        lambda state: first(state["visits"]).__setitem__(0, 10**6),
        lambda state: first(state["half_lives"]).__setitem__(0, 2.0),
        lambda state: state.update(fit=3),
        lambda state: state["fit"].update(weights=[[0.0]]),
        lambda state: state["fit"].update(products=(-np.eye(7)).tolist()),
        lambda state: first(state["fit"]["products"]).__setitem__(1, 77.0),
        lambda state: state["fit"].update(n_learnt=[[-1]]),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    spoil: Callable[[dict[str, object]], None],
) -> None:
    made: Visits = [(layer, ((token % 3, 1),), 1) for token in range(20) for layer in (0, 1)]
    state = saved(after(made))["worth"]
    spoil(state)
    policy = after(made)
    before = saved(policy)

    with pytest.raises(ValueError, match="saved"):
        policy.restore(state)

    assert saved(policy) == before


def test_a_fit_finds_the_law_of_its_examples_and_forgets_the_old_one() -> None:
    random = np.random.default_rng(0)
    fit = Regression((0.0, 0.0), 4)

    for law in ([0.5, 2.0], [-1.0, 0.25]):
        for _ in range(400):
            inputs = random.random((2, 16))
            fit.learn(np.vstack([inputs, law @ inputs]))
        assert fit.weights == pytest.approx(law, abs=0.1)


def test_a_fit_without_evidence_is_its_prior() -> None:
    fit = Regression((0.25, 0.5), 4)
    for _ in range(16):
        fit.learn(np.zeros((3, 5)))

    assert fit.weights == pytest.approx([0.25, 0.5])
