"""Systems side by side: the bench runs, and what is claimed of the committed run is in it."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bench import policies
from bench.policies import ORIGINAL, OURS, Cell, Place, Work, verdicts
from fiddler.lab.systems import SYSTEMS

RESULTS = Path(policies.__file__).parent / "results" / "policies-virtual.json"
MANY = ("qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(RESULTS.read_text())
    return report


def cells_of(report: dict[str, Any]) -> list[Cell]:
    return [Cell(**{**cell, "place": Place(**cell["place"])}) for cell in report["cells"]]


def test_a_cell_is_measured_and_shown() -> None:
    place = Place("fitted", "mixtral-8x7b", "rtx4090-desktop", 0.25, 1)
    cells = [policies.measure(place, system, Work(4, 3)) for system in (OURS, ORIGINAL, "all-cpu")]
    assert all(cell.tokens_per_s > 0 and 0 < cell.of_bound <= cell.of_chain <= 1 for cell in cells)
    assert cells[2].on_cpu == 1.0
    (verdict,) = verdicts(cells)
    assert verdict.over_original == cells[0].tokens_per_s / cells[1].tokens_per_s
    assert f"{cells[0].tokens_per_s:.2f}" in policies.render(cells, [OURS, ORIGINAL, "all-cpu"])


def test_the_committed_run_is_whole_and_says_that_its_time_is_virtual(committed: dict[str, Any]) -> None:
    assert committed["virtual"] is True
    options = argparse.Namespace(models=policies.MODELS, machines=policies.MACHINES)
    cells = cells_of(committed)
    assert [(c.place, c.system) for c in cells] == [(p, s) for p in policies.places(options) for s in SYSTEMS]
    judged = verdicts(cells)
    assert [v.over_best for v in judged] == [v["over_best"] for v in committed["verdicts"]]


def test_nowhere_is_ours_more_than_2_percent_behind_the_best_of_the_others(committed: dict[str, Any]) -> None:
    assert min(verdict.over_best for verdict in verdicts(cells_of(committed))) >= 0.98


@pytest.mark.parametrize("model", MANY)
def test_one_sequence_on_the_desktop_is_half_as_fast_again_as_by_the_original_s_rules(
    committed: dict[str, Any], model: str
) -> None:
    place = Place("fitted", model, "rtx4090-desktop", 0.25, 1)
    (found,) = [verdict for verdict in verdicts(cells_of(committed)) if verdict.place == place]
    assert found.over_original >= 1.5
