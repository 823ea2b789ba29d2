"""Tables in documents are what the result files say, and prose beside them claims nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import documents
from bench.documents import ROOT, main, written
from bench.report import RESULTS, Record, label, one, pick, read
from bench.tables import TABLES
from tests.architectures import included
from tests.models.test_lookahead import UNASKED

MACHINE = {"cpu": "Intel(R) Xeon(R) Processor", "n_cores": 2, "isa": ["avx512f", "amx_bf16"]}


def record(value: Any) -> Record:
    return Record(value)


@pytest.mark.parametrize("file", [*documents.documents()], ids=lambda file: file.name)
def test_tables_are_what_the_files_say(file: Path) -> None:
    assert written(file) == file.read_text(encoding="utf-8"), "run `make documents`"


def test_every_table_is_shown_once() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in documents.documents())
    assert sorted(re.findall(r"^<!-- table: (\S+) -->$", text, re.MULTILINE)) == sorted(TABLES)


def share(value: float, digits: int = 0) -> str:
    return f"{100.0 * value:.{digits}f} %"


def repeated() -> dict[str, str]:
    """Return the numbers of results that prose repeats, in its words, each with the document that has it."""
    plan, orders = read("plan-2core-epyc"), read("world-virtual").order_right.values()
    paths, ahead = read("quality-2core-epyc").paths, read("lookahead-2core-epyc")
    loss = paths["cpu, one of two experts deferred"].bits_per_byte / paths["cpu"].bits_per_byte - 1.0
    few, many = (one(plan.times, n_loads=n).median_us for n in (8, 128))
    first, second = (ahead.recall[f"precision of the look-ahead's choice {i}"].mean for i in (1, 2))
    cost, guesses = ahead.demo_us["1"], share(ahead.recall["the look-ahead"].mean)
    n_models = len(included())
    ceilings = sorted(read(f"latency-{name}-2core-amx").read_ceiling_gbs for name in ("qwen3", "mixtral"))
    assert (sum(not right for right in orders), len(orders)) == (6, 8)  # in words
    return {
        f"a plan took {few:.0f} \N{MICRO SIGN}s for 8 loads and {many:.0f} for 128": "scheduling.md",
        f"on {plan.settings.seeds:,} random layers": "scheduling.md",
        f"bits per byte rose by {share(loss, 1)}": "scheduling.md",
        f"{guesses} of its guesses come true, {share(first)} of the first and {share(second)} of": "scheduling.md",
        f"at one row that takes {share(cost.look_ahead_us / cost.dense_part_us, 1)}": "policies.md",
        f"works on {n_models - len(UNASKED)} of the {n_models} architectures": "policies.md",
        "The order is wrong in six of eight comparisons": "policies.md",
        f"{ceilings[0]:.1f} to {ceilings[1]:.1f} GB/s in these runs": "experiments.md",
    }


def test_numbers_that_prose_repeats_are_still_true() -> None:
    for says, file in repeated().items():
        text = (ROOT / "docs" / file).read_text(encoding="utf-8").replace("**", "")
        assert says in " ".join(text.split()), file


AHEAD = ("qwen3-30b-a3b", "mixtral-8x7b")
"""Models of which copies ahead land in time mostly, and seldom."""


def many(report: Record, routing: str, n_sequences: int) -> list[float]:
    """How many times as fast as `fiddler-2024`, a quarter resident, on the desktop, where experts are many."""
    asked = {"machine": "rtx4090-desktop", "resident": 0.25, "routing": routing, "n_sequences": n_sequences}
    return [v.over_original for v in pick(report.verdicts, **asked) if not v.place.model.startswith("mixtral")]


def test_what_prose_claims_of_all_cells_is_true() -> None:
    """Where one of these fails, `docs/policies.md` has to say something else."""
    systems, cache, world = read("policies-virtual"), read("cache"), read("world-virtual")
    assert min(v.over_best for v in systems.verdicts) > 1.0
    assert min(many(systems, "fitted", 1)) >= 1.5 > max(many(systems, "looser", 1))
    least = min(systems.verdicts, key=lambda v: v.of_bound).place
    assert (least.model, least.resident, least.n_sequences) == ("qwen3-30b-a3b", 0.5, 1)
    ahead = [c for c in pick(systems.cells, system="fiddler", machine="rtx4090-desktop") if c.n_ahead]
    assert min(c.n_ahead_used / c.n_ahead for c in ahead) > 0.5
    landed = {name: [c.n_ahead_landed / c.n_ahead for c in ahead if c.place.model == name] for name in AHEAD}
    assert min(landed[AHEAD[0]]) > 0.585
    assert max(landed[AHEAD[1]]) < 0.34
    for traces in ("demo, tuning", "demo, held out", "made up, tuning", "made up, held out"):
        online = [s for s in pick(cache.summary, traces=traces) if not s.policy.startswith(("belady", "foresight"))]
        assert min(online, key=lambda s: s.mean).policy == "forecast"
    assert one(cache.summary, policy="forecast", traces="demo, held out").mean <= 1.55
    llama = [c for c in world.cells if c.cell.system == "llama.cpp" and c.implied_cpu_share]
    assert all(c.implied_cpu_share < c.cpu_share / 2 for c in llama)
    assert 19.0 < max(c.of_data_sheet / c.cell.published for c in world.cells) < 21.0


def test_a_table_is_written_between_its_marks_and_nothing_else_is_touched(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("One.\n\n<!-- table: plan -->\nold\n<!-- end -->\n\nTwo, `<!-- end -->`.\n")
    new = written(file)
    assert new.startswith("One.\n\n<!-- table: plan -->\n\n| planner |")
    assert "results/plan-2core-epyc.json): 2 cores, AMD EPYC with AVX-512, no GPU.*\n\n<!-- end -->\n\nTwo" in new
    file.write_text(new)
    assert written(file) == new


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- table: plan -->\n", "in pairs"),
        ("<!-- end -->\n", "in pairs"),
        ("<!-- table: plan -->\n<!-- table: plan -->\n<!-- end -->\n", "in pairs"),
        ("<!-- table: plans -->\n<!-- end -->\n", "'plans' is none of the tables: .*plan"),
    ],
)
def test_wrong_marks_are_named(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        written(file)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: plan -->\n<!-- end -->\n")
    for options, code, says in (
        (["--check"], 1, "README.md: not what the results say\n"),
        ([], 0, "README.md: written\n"),
        (["--check"], 0, ""),
    ):
        with pytest.raises(SystemExit) as left:
            main(options)
        assert (left.value.code, capsys.readouterr().out) == (code, says)


def test_labels(tmp_path: Path) -> None:
    for changes, said in (
        ({"gpu": {"name": "NVIDIA H100"}}, "2 cores, Intel Xeon with AMX, NVIDIA H100"),
        ({"cpu": "AMD EPYC 7B13 64-Core Processor", "n_cores": 8, "isa": []}, "8 cores, AMD EPYC 7B13, no GPU"),
    ):
        file = tmp_path / f"{len(said)}.json"
        file.write_text(json.dumps({"bench": "plan", "machine": MACHINE | changes, "virtual": False}))
        assert label(read(file.stem, tmp_path)) == said
    assert [label(read(name)) for name in ("waves-virtual", "cache")] == ["virtual time", "replayed"]
    assert all(label(read(file.stem)) for file in RESULTS.glob("*.json"))


def test_entries_are_found_by_their_fields() -> None:
    rows = [record({"n": 1, "place": record({"model": "a"})}), record({"n": 2, "place": record({"model": "a"})})]
    assert pick(rows, model="a") == rows
    assert one(rows, n=2, model="a").n == 2
    with pytest.raises(LookupError, match="0 entries"):
        one(rows, n=3)
    with pytest.raises(AttributeError, match="no 'm' among n, place"):
        _ = rows[0].m
