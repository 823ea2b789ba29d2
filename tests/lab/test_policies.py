"""What each policy says an expert is worth, by hand."""

import json
import math

import pytest

from fiddler.cache.policies import AgedLfu
from fiddler.cache.policy import History, Policy, Rows
from fiddler.errors import ConfigError
from fiddler.lab.policies import POLICIES, by_popularity, make_policy, uniform


def observe(policy: Policy, layer: int, rows: Rows, n_tokens: int = 1, scores: list[float] | None = None) -> None:
    policy.history.observe(layer, rows, n_tokens)
    policy.observe(layer, rows, n_tokens, scores)


def test_history_keeps_a_clock_per_layer() -> None:
    history = History((2, 3))
    history.observe(0, [(1, 4)], 4)
    history.observe(0, [(0, 1)], 1)
    history.observe(1, [(2, 2), (0, 1)], 4)
    assert (history.n_visits, history.n_tokens) == (3, 5)
    assert (history.layer_tokens(0), history.layer_tokens(1)) == (5, 4)
    assert (history.n_rows((0, 1)), history.last_visit((0, 1)), history.last_token((0, 1))) == (4, 1, 4)
    assert (history.n_rows((1, 2)), history.last_visit((1, 2)), history.last_token((1, 2))) == (2, 3, 4)
    assert (history.n_rows((1, 1)), history.last_visit((1, 1)), history.last_token((1, 1))) == (0, 0, 0)


def test_a_visit_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        History((2,)).observe(0, [], 0)


def test_lru_counts_visits_of_all_layers() -> None:
    policy = make_policy("lru", (2, 2))
    observe(policy, 0, [(0, 1)])
    observe(policy, 1, [(1, 1)])
    observe(policy, 0, [(1, 9)])
    assert [policy.score(key) for key in ((0, 1), (1, 1), (0, 0), (1, 0))] == [1.0, 1 / 2, 1 / 3, 0.0]


def test_lfu_counts_rows() -> None:
    policy = make_policy("lfu", (2,))
    observe(policy, 0, [(0, 3), (1, 1)], 4)
    observe(policy, 0, [(1, 1)])
    assert [policy.score((0, expert)) for expert in (0, 1)] == [3.0, 2.0]


def test_lfru_divides_rows_by_the_age_in_tokens_of_the_layer() -> None:
    policy = make_policy("lfru", (2, 2))
    observe(policy, 0, [(0, 6)], 6)
    observe(policy, 0, [(1, 2)], 2)
    observe(policy, 1, [(0, 5)], 100)
    assert policy.score((0, 0)) == 6 / (2 + 1)
    assert policy.score((0, 1)) == 2 / (0 + 1)
    assert policy.score((1, 0)) == 5.0, "its own layer has seen nothing since"
    assert policy.score((1, 1)) == 0.0


def test_aged_lfu_halves_a_row_after_its_half_life() -> None:
    policy = make_policy("aged-lfu", (2, 1), half_life=4)
    observe(policy, 0, [(0, 1)])
    for _ in range(4):
        observe(policy, 0, [(1, 1)])
    assert policy.score((0, 0)) == pytest.approx(0.5)
    assert policy.score((0, 1)) == pytest.approx(1 + 2**-0.25 + 2**-0.5 + 2**-0.75)
    assert policy.score((1, 0)) == 0.0


def test_aged_lfu_gives_a_row_of_a_chunk_the_mean_weight_of_its_places() -> None:
    policy = make_policy("aged-lfu", (1,), half_life=2)
    observe(policy, 0, [(0, 3)], 4)
    assert policy.score((0, 0)) == pytest.approx(3 * (1 + 2**-0.5 + 2**-1 + 2**-1.5) / 4)


def test_aged_lfu_ages_by_its_own_layer_only() -> None:
    policy = make_policy("aged-lfu", (1, 1), half_life=8)
    observe(policy, 0, [(0, 1)])
    observe(policy, 1, [(0, 1)])
    observe(policy, 0, [(0, 1)], 4096)
    assert policy.score((1, 0)) == 1.0, "a prompt that has not reached the layer yet says nothing about it"


def test_aged_counts_stay_exact_far_from_the_beginning() -> None:
    history = History((2,))
    counts = AgedLfu(history, 32.0)
    for rows, n_tokens in (([], 10**9), ([(0, 1)], 1), ([(1, 1)], 1), ([(0, 1)], 1)):
        history.observe(0, rows, n_tokens)
        counts.observe(0, rows, n_tokens)
    assert counts.score((0, 0)) == pytest.approx(1 + 2 ** (-2 / 32), rel=1e-6)
    assert counts.score((0, 1)) == pytest.approx(2 ** (-1 / 32), rel=1e-6)


def test_hybrimoe_keeps_the_largest_probabilities_and_halves_the_past() -> None:
    policy = make_policy("hybrimoe", (4,), top_k=1)
    observe(policy, 0, [(0, 1)], 1, [0.5, 0.25, 0.15, 0.1])
    assert [policy.score((0, expert)) for expert in range(4)] == [0.25, 0.125, 0.0, 0.0]
    observe(policy, 0, [(2, 1), (0, 1)], 2, [0.4, 0.2, 1.2, 0.2])
    assert [policy.score((0, expert)) for expert in range(4)] == pytest.approx([0.225, 0.0625, 0.3, 0.0])


def test_hybrimoe_takes_rows_where_it_gets_no_probabilities() -> None:
    policy = make_policy("hybrimoe", (4,), top_k=1)
    observe(policy, 0, [(0, 1), (1, 3), (3, 1)], 4)
    assert [policy.score((0, expert)) for expert in range(4)] == [0.125, 0.375, 0.0, 0.0], "ties to the lower index"


def test_static_admits_the_first_of_its_order() -> None:
    policy = make_policy("static", (2, 2), order=[(1, 1), (0, 0), (1, 0)])
    assert [policy.score(key) for key in ((1, 1), (0, 0), (1, 0), (0, 1))] == [3.0, 2.0, 1.0, 0.0]
    assert [policy.admits(key, 2) for key in ((1, 1), (0, 0), (1, 0), (0, 1))] == [True, True, False, False]
    assert not policy.admits((0, 1), 4), "not in the order"


def test_orders_of_a_placement() -> None:
    assert uniform((2, 1, 2)) == ((0, 0), (1, 0), (2, 0), (0, 1), (2, 1))
    assert by_popularity([[1, 5], [5, 7]]) == ((1, 1), (1, 0), (0, 1), (0, 0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("best", {}, "known are aged-lfu, forecast, hybrimoe, layer-lru, lfru, lfu, lru, static"),
        ("aged-lfu", {"half_life": 0}, "half_life"),
        ("aged-lfu", {"half_life": math.inf}, "half_life"),
        ("hybrimoe", {"top_k": 0}, "top_k"),
        ("static", {"order": [(0, 0), (0, 0)]}, "twice"),
        ("static", {"order": [(1, 0)]}, "does not have"),
    ],
)
def test_impossible_options_are_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(name, (2,), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", POLICIES)
def test_saved_worth_is_the_same_worth(name: str) -> None:
    policy = make_policy(name, (2, 3))
    for token in range(9):
        observe(policy, 0, [(token % 2, 1)], 1 + token)
        observe(policy, 1, [(token % 3, 2)], 1 + token)
    restored = make_policy(name, (2, 3))
    restored.history.restore(json.loads(json.dumps(policy.history.state())))
    restored.restore(json.loads(json.dumps(policy.state(), allow_nan=False)))
    for key in uniform((2, 3)):
        assert (restored.rank(key), restored.score(key)) == (policy.rank(key), policy.score(key))
        assert policy.name == name


def test_aged_counts_saved_with_another_half_life_keep_their_value() -> None:
    policy, restored = make_policy("aged-lfu", (2,), half_life=4), make_policy("aged-lfu", (2,), half_life=64)
    for _ in range(20):
        observe(policy, 0, [(0, 1)])
    restored.history.restore(policy.history.state())
    restored.restore(policy.state())
    assert restored.score((0, 0)) == pytest.approx(policy.score((0, 0)))
    assert restored.score((0, 1)) == 0.0
