"""Made-up routing: what it promises of every token, and the habits that were asked for."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fiddler.errors import ConfigError
from fiddler.lab.synthetic import PUBLISHED, Habits, SyntheticRouting, read_counts

PLAIN = Habits(skew=0.0, topic=0.0, recurrence=0.0, drift=0.0)


def routing(
    *, n_layers: int = 3, n_experts: int = 16, top_k: int = 4, habits: Habits = PLAIN, seed: int = 0
) -> NDArray[np.int16]:
    return SyntheticRouting(n_layers, n_experts, top_k, habits, seed).sequence(0, 400)


def shares(rows: NDArray[np.int16], n_experts: int = 16) -> NDArray[np.float64]:
    """Of all visits, each expert's, by layer."""
    counts = np.array([np.bincount(rows[:, layer].ravel(), minlength=n_experts) for layer in range(rows.shape[1])])
    return np.asarray(counts / (rows.shape[0] * rows.shape[2]), dtype=np.float64)


def recurring(rows: NDArray[np.int16]) -> float:
    """Of a token's experts, the share that the token before visited too."""
    return float(
        np.mean(
            [
                np.isin(now[layer], before[layer]).mean()
                for before, now in pairwise(rows)
                for layer in range(rows.shape[1])
            ]
        )
    )


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 2), (16, 4), (4, 4), (5, 1)])
def test_a_token_visits_distinct_experts_that_there_are(n_experts: int, top_k: int) -> None:
    rows = SyntheticRouting(3, n_experts, top_k).sequence(0, 50)

    assert rows.shape == (50, 3, top_k)
    assert rows.dtype == np.int16
    assert rows.min() >= 0
    assert rows.max() < n_experts
    assert (np.diff(rows, axis=2) > 0).all()  # ascending, so no expert twice


def test_the_same_seed_draws_the_same_and_another_another() -> None:
    made = SyntheticRouting(2, 8, 2, seed=1)

    assert np.array_equal(made.sequence(0, 30), SyntheticRouting(2, 8, 2, seed=1).sequence(0, 30))
    assert not np.array_equal(made.sequence(0, 30), made.sequence(1, 30))
    assert not np.array_equal(made.sequence(0, 30), SyntheticRouting(2, 8, 2, seed=2).sequence(0, 30))


def test_a_longer_sequence_begins_as_a_shorter_one() -> None:
    made = SyntheticRouting(2, 8, 2)

    assert np.array_equal(made.sequence(0, 60)[:30], made.sequence(0, 30))


def test_without_habits_all_experts_are_visited_alike_and_independently() -> None:
    rows = routing()

    assert np.abs(shares(rows) - 1 / 16).max() < 0.02
    assert recurring(rows) == pytest.approx(4 / 16, abs=0.02)


def test_skew_makes_some_experts_popular_with_every_sequence() -> None:
    made = SyntheticRouting(3, 16, 4, Habits(skew=1.0, topic=0.0, recurrence=0.0, drift=0.0))
    one, two = (shares(made.sequence(i, 400)) for i in (0, 1))

    assert one.max(axis=1).min() > 2 / 16
    assert all(np.corrcoef(a, b)[0, 1] > 0.9 for a, b in zip(one, two, strict=True))


def test_topics_make_them_popular_with_one_sequence_only() -> None:
    made = SyntheticRouting(3, 16, 4, Habits(skew=0.0, topic=1.0, recurrence=0.0, drift=0.0))
    one, two = (shares(made.sequence(i, 400)) for i in (0, 1))

    assert one.max(axis=1).min() > 2 / 16
    assert all(np.corrcoef(a, b)[0, 1] < 0.7 for a, b in zip(one, two, strict=True))


def test_recurrence_brings_back_the_experts_of_the_token_before() -> None:
    none, some, much = (
        recurring(routing(habits=Habits(skew=0.0, topic=0.0, recurrence=r, drift=0.0))) for r in (0.0, 1.5, 3.0)
    )

    assert none + 0.1 < some < much - 0.1


def test_drift_changes_what_a_sequence_prefers() -> None:
    def change(drift: float) -> float:
        rows = SyntheticRouting(3, 16, 4, Habits(skew=0.0, topic=1.5, recurrence=0.0, drift=drift)).sequence(0, 800)
        return float(np.abs(shares(rows[:400]) - shares(rows[400:])).sum())

    assert change(0.02) > 2 * change(0.0)


def test_passages_change_within_a_topic_and_leave_everything_else_alone() -> None:
    def made(passage: float, drift: float) -> NDArray[np.int16]:
        habits = Habits(skew=0.0, topic=0.0, recurrence=0.0, drift=0.0, passage=passage, passage_drift=drift)
        return SyntheticRouting(3, 16, 4, habits).sequence(0, 800)

    def change(rows: NDArray[np.int16]) -> float:
        return float(np.abs(shares(rows[:50]) - shares(rows[50:100])).sum())

    assert change(made(1.5, 0.05)) > 1.5 * change(made(1.5, 0.0))
    assert np.array_equal(made(0.0, 0.05), made(0.0, 0.0))


def test_a_longer_memory_brings_experts_back_after_more_tokens() -> None:
    def after_four(memory: float) -> float:
        habits = Habits(skew=0.0, topic=0.0, recurrence=3.0, drift=0.0, memory=memory)
        return recurring(routing(n_experts=64, top_k=2, habits=habits)[::4])

    assert after_four(8.0) > after_four(1.0) + 0.02


def test_spread_makes_layers_differ() -> None:
    def favourites(spread: float) -> NDArray[np.float64]:
        habits = Habits(skew=0.7, topic=0.0, recurrence=0.0, drift=0.0, spread=spread)
        return np.asarray(shares(routing(n_layers=24, habits=habits)).max(axis=1))

    assert favourites(0.8).std() > 1.5 * favourites(0.0).std()


def test_fineness_strengthens_the_habits_of_models_with_many_experts_for_each_that_works() -> None:
    def favourite(n_experts: int, fineness: float) -> float:
        habits = Habits(skew=0.5, topic=0.0, recurrence=0.0, drift=0.0, fineness=fineness)
        rows = routing(n_layers=8, n_experts=n_experts, top_k=2, habits=habits)
        return float(shares(rows, n_experts).max(axis=1).mean())

    assert favourite(8, 0.0) == favourite(8, 2.0), "as many for each as Mixtral has"
    assert favourite(32, 2.0) > 2 * favourite(32, 0.0)


def test_the_published_habits_are_as_local_as_replays_say() -> None:
    mixtral = SyntheticRouting(16, 8, 2, PUBLISHED).sequence(0, 200)
    fine = SyntheticRouting(8, 64, 6, PUBLISHED).sequence(0, 200)

    assert 0.28 < recurring(mixtral) < 0.48, "by chance: 0.25"
    assert recurring(fine) > 3 * 6 / 64


def test_counts_are_drawn_as_often_as_they_say() -> None:
    counts = np.array([[10.0, 20.0, 30.0, 40.0, 60.0, 80.0, 80.0, 80.0], [90.0, 50.0] + [10.0] * 6])
    made = SyntheticRouting.counted(counts, 2, habits=Habits(recurrence=0.0))

    drawn = shares(made.sequence(0, 4000), n_experts=8)

    assert (made.n_layers, made.n_experts, made.top_k) == (2, 8, 2)
    assert np.abs(drawn - counts / counts.sum(axis=1, keepdims=True)).max() < 0.03


def test_recurrence_leaves_the_popular_popular() -> None:
    counts = np.array([[10.0, 20.0, 30.0, 40.0, 60.0, 80.0, 100.0, 120.0]])
    made = SyntheticRouting.counted(counts, 2)
    rows = made.sequence(0, 4000)

    assert np.corrcoef(shares(rows, n_experts=8)[0], counts[0])[0, 1] > 0.9
    assert recurring(rows) > recurring(
        SyntheticRouting.counted(counts, 2, habits=Habits(recurrence=0.0)).sequence(0, 4000)
    )


def test_an_expert_that_was_never_visited_is_rare_and_one_that_always_was_frequent() -> None:
    rows = SyntheticRouting.counted(np.array([[0.0, 100.0, 50.0, 50.0]]), 2).sequence(0, 500)

    drawn = shares(rows, n_experts=4)[0]
    assert drawn[0] < 0.02
    assert drawn[1] > 0.45


def test_counts_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"total_input_tokens": 3, "expert_popularity": [[1, 2], [3, 0]]}))

    assert read_counts(file).tolist() == [[1.0, 2.0], [3.0, 0.0]]


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "nonsense",
        '{"expert_popularity": 3}',
        '{"expert_popularity": [1, 2]}',
        '{"expert_popularity": [[1, 2], [3]]}',
        '{"expert_popularity": [[1, -2]]}',
        '{"expert_popularity": [[0, 0]]}',
        '{"expert_popularity": [["a", "b"]]}',
        '{"expert_popularity": [[NaN, 1]]}',
        '{"expert_popularity": []}',
    ],
)
def test_a_file_without_counts_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "counts.json"
    file.write_text(content)

    with pytest.raises(ConfigError, match=r"counts\.json.*expert_popularity"):
        read_counts(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        read_counts(tmp_path / "missing.json")
