"""Simulations that copy ahead: what that gains with perfect guesses, costs with bad ones, and reports."""

from dataclasses import replace

import numpy as np
import pytest

from fiddler.lab.simulation import simulate
from fiddler.lab.systems import PREFETCH
from fiddler.recording import Recording, guesses
from fiddler.trace import Trace
from fiddler.types import PrefetchStatistics
from tests.lab.test_simulation import SMALL, setting, text

MODES = tuple(PREFETCH)
SEEDS = range(4)


def foreseen(n: int = 1, *, recall: float = 1.0, prompt: int = 20, new: int = 40, seed: int = 0) -> list[Recording]:
    """Sequences with a look-ahead made up for them."""
    made = text(n, prompt=prompt, new=new, seed=seed)
    return [replace(s, ahead=guesses(s.experts, recall, seed=100 * seed + i)) for i, s in enumerate(made)]


def slowdowns(n: int, n_slots: int, recall: float) -> list[float]:
    """By seed, how many times as long decoding takes with copies ahead as without."""
    found = []
    for seed in SEEDS:
        sequences = foreseen(n, recall=recall, seed=seed)
        ahead, off = (simulate(setting(prefetch=mode, n_slots=n_slots), sequences) for mode in ("auto", "off"))
        found.append(ahead.decode_s / off.decode_s)
    return found


@pytest.mark.parametrize("prefetch", MODES)
@pytest.mark.parametrize("n_slots", [0, 4, 24, 70, 96])
def test_no_run_that_copies_ahead_is_faster_than_its_bytes_allow(prefetch: str, n_slots: int) -> None:
    report = simulate(setting(prefetch=prefetch, n_slots=n_slots), foreseen(3, new=9))
    assert 0.0 < report.of_bound <= report.of_chain <= 1.0 + 1e-9
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in report.utilisation.values())


@pytest.mark.parametrize(("n", "n_slots"), [(1, 8), (1, 24), (1, 72), (3, 24)])
def test_perfect_guesses_are_never_slower_and_faster_on_average(n: int, n_slots: int) -> None:
    found = slowdowns(n, n_slots, recall=1.0)
    assert max(found) <= 1.01
    assert np.mean(found) < 0.995


@pytest.mark.parametrize("n_slots", [8, 24, 72])
def test_guesses_that_never_come_true_cost_next_to_nothing(n_slots: int) -> None:
    assert max(slowdowns(1, n_slots, recall=0.0)) <= 1.01


def test_better_guesses_are_used_more_often() -> None:
    reports = [
        simulate(setting(prefetch="eager", staging="layer"), foreseen(recall=recall))
        for recall in (0.0, 0.5, 0.75, 1.0)
    ]
    used = [report.prefetch.n_used / report.prefetch.n_issued for report in reports]
    assert used == sorted(used)
    assert used[-1] > 0.99
    recalls = [report.prefetch.precision for report in reports]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1.0


@pytest.mark.parametrize("prefetch", MODES)
def test_every_copy_is_counted_by_its_reason(prefetch: str) -> None:
    """Without a prompt all of it is decoding."""
    trace = Trace()
    report = simulate(
        setting(prefetch=prefetch, n_slots=40, staging="layer"), foreseen(prompt=0, recall=0.75), trace=trace
    )
    ahead = report.prefetch
    copies = report.n_fetches + report.n_promotions + ahead.n_issued
    assert report.read_bytes["link"] == copies * SMALL.expert_bytes
    made = [span for span in trace.spans if span.kind == "ahead"]
    assert ahead.n_issued - len(made) in {0, 1}, "one may still be under way at the end"
    assert (ahead.n_issued > 0) is (prefetch != "off")
    assert max(ahead.n_landed, ahead.n_used) <= ahead.n_issued
    assert 0.0 <= ahead.precision <= 1.0
    assert ahead.delay_s >= 0.0


def test_without_it_nothing_is_reported() -> None:
    assert simulate(setting(prefetch="off"), foreseen()).prefetch == PrefetchStatistics()


@pytest.mark.parametrize("prefetch", MODES)
def test_runs_that_copy_ahead_repeat(prefetch: str) -> None:
    one, two = (simulate(setting(prefetch=prefetch), foreseen(2, new=12, recall=0.75)) for _ in range(2))
    assert one == two


def test_a_model_without_a_look_ahead_falls_back_on_what_usually_follows() -> None:
    blind = text(new=80)
    assert simulate(setting(prefetch="look-ahead"), blind).prefetch == PrefetchStatistics()
    assert simulate(setting(prefetch="auto"), blind) == simulate(setting(prefetch="transitions"), blind)
