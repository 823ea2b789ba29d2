"""Every committed result has the fields that its readers need, and says where it comes from."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import bench
from bench.schemas import SCHEMAS, problems

FILES = sorted((Path(bench.__file__).parent / "results").glob("*.json"))


def read(file: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_result_has_its_schema(file: Path) -> None:
    assert problems(read(file)) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_result_is_named_by_its_bench_and_knows_its_commit(file: Path) -> None:
    report = read(file)
    name, _, rest = file.stem.partition("-")
    assert name == report["bench"]
    assert ("virtual" in rest) == report["virtual"]
    assert report["machine"]["commit"]
    assert datetime.fromisoformat(report["machine"]["date"]).tzinfo is not None


def test_a_schema_finds_what_is_wrong() -> None:
    report = read(next(file for file in FILES if file.stem == "waves-virtual"))
    report["cells"][1].pop("of_bound")
    report["cells"][2]["n_sequences"] = "two"
    report["setting"]["prompt"] = True
    assert problems(report) == [
        "waves.setting.prompt is True, not of int",
        "waves.cells[1] lacks 'of_bound'",
        "waves.cells[2].n_sequences is 'two', not of int",
    ]


def test_what_may_be_absent_is_checked_where_it_is_there() -> None:
    report = read(next(file for file in FILES if file.stem.startswith("latency-")))
    absent = {"parts": [], "read_ceiling_gbs": None}
    assert problems({name: value for name, value in report.items() if name != "model"} | absent) == []
    report["systems"][0]["unavailable"] = 5
    assert problems(report) == ["latency.systems[0].unavailable is 5, not of str"]


@pytest.mark.parametrize("key", ["bench", "machine", "virtual"])
def test_what_every_result_has_is_missed(key: str) -> None:
    report = read(FILES[0])
    report.pop(key)
    assert problems(report) == [f"report lacks {key!r}"]


@pytest.mark.parametrize("cells", [[], {}, None])
def test_nothing_is_not_a_result(cells: object) -> None:
    report = read(next(file for file in FILES if file.stem == "waves-virtual")) | {"cells": cells}
    assert problems(report) == [f"waves.cells is {cells!r}, not a list with something in it"]


def test_a_bench_without_a_schema_is_named() -> None:
    assert problems(read(FILES[0]) | {"bench": "nobody's"}) == ['no schema of bench "nobody\'s"']
    assert set(SCHEMAS) >= {read(file)["bench"] for file in FILES}
