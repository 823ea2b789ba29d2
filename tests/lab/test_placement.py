"""What a fixed placement meets of a text's visits: by hand, and on the counts published for Mixtral-8x7B.

The published counts are no part of this repository. They are in efeslab/fiddler, branch `popularity`, under
`benchmarks/results/popularity`: JSON files with `expert_popularity` by layer and expert. FIDDLER_ROUTING names a
folder that holds them; without it, `shared/routing` beside the repository is looked into.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from fiddler.cache.policy import Key, Visit
from fiddler.lab.policies import by_popularity, make_policy, uniform
from fiddler.lab.replay import replay
from fiddler.lab.synthetic import read_counts

Counts = list[list[float]]
BESIDE = Path(__file__).parents[3] / "shared" / "routing"
COUNTS: Counts = [[1, 5, 2], [4, 0, 8]]
"""Of 20 visits."""


def share_of_visits(order: Sequence[Key], n_slots: int, counts: Sequence[Sequence[float]]) -> float:
    """Return the share of visits, counted by layer and expert, [L][E], that meets the first `n_slots` of `order`.

    That is the hit rate of the placement on a text with these counts.
    """
    return sum(counts[layer][expert] for layer, expert in order[:n_slots]) / sum(map(sum, counts))


def test_by_hand() -> None:
    order = uniform((3, 3))
    assert order == ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2))
    assert [share_of_visits(order, n, COUNTS) for n in range(7)] == [0, 0.05, 0.25, 0.5, 0.5, 0.6, 1]


def test_the_order_of_a_text_s_own_counts_is_the_best_for_it() -> None:
    order = by_popularity(COUNTS)
    assert order == ((1, 2), (0, 1), (1, 0), (0, 2), (0, 0), (1, 1))
    assert [share_of_visits(order, n, COUNTS) for n in range(7)] == [0, 0.4, 0.65, 0.85, 0.95, 1, 1]


def test_another_text_s_order_is_between() -> None:
    other: Counts = [[0, 3, 2], [5, 1, 1]]
    order = by_popularity(other)
    assert order[:3] == ((1, 0), (0, 1), (0, 2))
    assert [share_of_visits(order, n, COUNTS) for n in range(4)] == [0, 0.2, 0.45, 0.55]


def test_a_placement_that_is_there_from_the_start_hits_what_the_counts_say() -> None:
    order = by_popularity(COUNTS)
    trace: list[Visit] = [
        (layer, ((expert, 1),), 1)
        for layer, row in enumerate(COUNTS)
        for expert, n in enumerate(row)
        for _ in range(int(n))
    ]
    played = replay(trace, make_policy("static", (3, 3), order=order), 3)
    n_hits = played.n_hits + 3  # each of the three was copied in at its first visit
    assert n_hits / len(trace) == share_of_visits(order, 3, COUNTS)


def folder() -> Path:
    named = Path(os.environ.get("FIDDLER_ROUTING", BESIDE))
    if not named.is_dir():
        pytest.skip("FIDDLER_ROUTING names no folder with the counts published for Mixtral-8x7B")
    return named


@pytest.fixture(scope="module")
def texts() -> list[Counts]:
    """Of two models and seven subjects each."""
    files = sorted(folder().glob("mixtral-8x7b-*.json")) or sorted(folder().rglob("expert_popularity_*.json"))
    counts: list[Counts] = [read_counts(file).tolist() for file in files]
    assert len(counts) == 14
    return counts


def range_of_hits(order: tuple[Key, ...], n_slots: int, texts: list[Counts]) -> list[float]:
    """Least and most, in percent."""
    shares = [100 * share_of_visits(order, n_slots, counts) for counts in texts]
    return [min(shares), max(shares)]


@pytest.mark.parametrize(("n_slots", "percent"), [(56, 21.9), (125, 48.8)])
def test_published_counts_without_knowledge(texts: list[Counts], n_slots: int, percent: float) -> None:
    # which expert of a layer comes first means nothing: the mean over all that could
    turns = [tuple((layer, (expert + turn) % 8) for layer, expert in uniform((8,) * 32)) for turn in range(8)]
    for counts in texts:
        shares = [share_of_visits(order, n_slots, counts) for order in turns]
        assert 100 * sum(shares) / 8 == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(("n_slots", "percent"), [(56, [22.8, 26.4]), (125, [49.8, 53.5])])
def test_published_counts_in_the_original_s_order(texts: list[Counts], n_slots: int, percent: list[float]) -> None:
    file = Path(__file__).parent / "original_order.json"
    order = tuple((layer, expert) for layer, expert in json.loads(file.read_text())["order"])
    assert len(set(order)) == len(order) >= n_slots
    assert range_of_hits(order, n_slots, texts) == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(("n_slots", "percent"), [(56, [26.1, 30.5]), (125, [54.5, 60.5])])
def test_published_counts_in_their_own_order(texts: list[Counts], n_slots: int, percent: list[float]) -> None:
    found = [range_of_hits(by_popularity(counts), n_slots, [counts])[0] for counts in texts]
    assert [min(found), max(found)] == pytest.approx(percent, abs=0.05)
