"""Every committed result says where it comes from; what its readers need, documents and figures read."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from bench.report import RESULTS

MACHINE = {"cpu", "n_cores", "isa", "ram_gib", "torch", "transformers", "fiddler", "threads", "commit", "date"}


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_result_is_named_by_its_bench_and_knows_its_machine_and_commit(file: Path) -> None:
    report = json.loads(file.read_text(encoding="utf-8"))
    name, _, rest = file.stem.partition("-")
    assert name == report["bench"]
    assert ("virtual" in rest) == report["virtual"]
    assert report["machine"].keys() >= MACHINE
    assert report["machine"]["commit"]
    assert datetime.fromisoformat(report["machine"]["date"]).tzinfo is not None
