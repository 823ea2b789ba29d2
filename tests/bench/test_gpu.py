"""The GPU's bench from end to end on the fake: what it writes and what it says; its times mean nothing here."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from bench import machine
from bench.gpu import __main__ as command
from bench.gpu import decode, summary, timeline
from bench.gpu.context import Context
from bench.gpu.facts import Rates
from bench.gpu.running import Reading
from bench.gpu.sizes import QUICK, Sizes
from bench.gpu.slots import FORMS
from bench.report import Record, label
from fiddler import ConfigError, EngineConfig
from fiddler.calibration import dense as measure_dense
from fiddler.calibration import measure
from fiddler.engine import gpu_assembly
from fiddler.gpu import cuda
from fiddler.lab.machine import Machine
from fiddler.lab.shape import ModelShape
from fiddler.trace import Decision, Span, Trace
from tests.support.fake_gpu import FakeGpu

LABEL = "fake"
# fmt: off
SMALL = replace(
    QUICK, minutes=60.0, models=("tiny",), few="tiny:layers=3", budgets_gib=(0.0022,),
    kv_tokens=256, chunk_tokens=16, n_prompt=4, n_warm=4, n_new=6, n_sequences=(1, 2), first_token=(8,), rounds=1,
    repeats=2, patience_s=20.0, read_bytes=1 << 20, gpu_read_bytes=1 << 20, copy_bytes=1 << 20,
    slot_bytes=1 << 16,
    shapes={"tiny": (256, 256)}, rows=(1, 4), gemm=64, launches=5, passes=2,
)
# fmt: on


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `device="cuda"` find fakes, one for each that asks; measure less."""
    seeds = iter(range(1000))
    monkeypatch.setattr(cuda, "open_gpu", lambda: FakeGpu(next(seeds)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_assembly, "GRAPHS_BYTES", 0)
    # Where another test has had Triton's interpreter, kernels would run in it, and take minutes.
    monkeypatch.setitem(sys.modules, "fiddler.gpu.triton_kernels", None)
    monkeypatch.setattr(measure, "CURVE_S", 0.0)
    monkeypatch.setattr(measure, "LEAST", 2)
    monkeypatch.setattr(measure, "BESIDE_S", 0.01)
    monkeypatch.setattr(measure_dense, "STEPS_S", 0.0)
    monkeypatch.setattr(measure_dense, "LEAST_STEPS", 1)
    monkeypatch.setattr(command, "QUICK", SMALL)


def run(out: Path, *options: str) -> int:
    return command.main(["--quick", "--out", str(out), "--label", LABEL, *options])


def read(out: Path, part: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / f"gpu-{part}-{LABEL}.json").read_text(encoding="utf-8"))
    assert (report["bench"], report["part"], report["virtual"]) == ("gpu", part, False)
    return report


def test_every_part_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    assert run(out) == 0
    reports = {part: read(out, part) for part in command.PARTS}
    for part, report in reports.items():
        assert report["complete"], part
        assert "failed" not in report, report
    _check_facts(out, reports["facts"])
    _check_decode(reports["decode"])
    _check_timeline(out, reports["timeline"])
    for row in reports["resident"]["rows"]:
        assert row["tokens_per_s"].keys() | row["unavailable"].keys() == {"fiddler", "eager", "grouped_mm"}
    assert len(reports["summary"]["verdicts"]) == 5
    assert all(verdict["met"] is not None for verdict in reports["summary"]["verdicts"])
    assert "What must be true" in capsys.readouterr().out


def _check_facts(out: Path, facts: dict[str, Any]) -> None:
    made = Machine.load(out / facts["machine_file"])
    assert made.link_bytes_per_s == facts["link"]["to_gpu_gbs"]["median"] * 1e9
    assert facts["recording"]["records"]
    assert set(facts["recording"]["n_pieces"]) == {4}
    assert {row["format"] for row in facts["slot_quantised"] if row["gbs"]["median"] > 0} == set(FORMS)
    paths = {row["path"]: row for row in facts["slot_experts"]}
    assert set(paths) == {"triton", "grouped", "loop"}
    assert paths["loop"]["gbs"]["median"] > 0.0
    assert facts["launches"]["graph"]["gpu_s"] > 0.0


def _check_decode(found: dict[str, Any]) -> None:
    assert [place["unavailable"] for place in found["places"]] == [None] * len(SMALL.systems)
    assert {place["system"]: place["n_slots"] for place in found["places"]}["all-cpu"] == 0
    for row in found["decode"]:
        assert row["n_readings"] == 2
        assert row["of_bound"]["median"] > 0.0
        reads = {lane: spread["median"] for lane, spread in row["read_bytes_per_token"].items()}
        assert (reads["gpu"] == reads["link"] == 0.0) == (row["system"] == "all-cpu")
    assert {(row["system"], row["n_sequences"]) for row in found["decode"]} == {
        (name, n) for name in SMALL.systems for n in (1, 2)
    }
    assert len(found["first_token"]) == len(SMALL.systems)


def _check_timeline(out: Path, found: dict[str, Any]) -> None:
    run = found["run"]
    assert json.loads((out / run["files"]["json"]).read_text())["traceEvents"]
    assert (out / run["files"]["png"]).read_bytes().startswith(b"\x89PNG")
    assert run["prediction"]["p90"] >= run["prediction"]["median"] >= 0.0
    assert 0.0 <= run["nobody_s_a_layer"] <= run["lanes"]["wall_s"]


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing() -> None:
        raise ConfigError("no GPU")

    monkeypatch.setattr(cuda, "open_gpu", nothing)
    assert run(tmp_path / "out") == 2
    assert "measures an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def failing(_: Context) -> dict[str, Any]:
    raise RuntimeError("it is broken")


def test_a_part_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(command, "PARTS", {"facts": failing, "summary": summary.summary})
    assert run(out, "--only", "facts,summary") == 1
    facts = read(out, "facts")
    assert (facts["error"], facts["complete"]) == ("RuntimeError: it is broken", False)
    assert all(verdict["met"] is None for verdict in read(out, "summary")["verdicts"])


def test_a_system_that_fails_stops_no_other_and_is_not_asked_again(tmp_path: Path) -> None:
    out, options = tmp_path / "out", decode.options_of

    def broken(name: str) -> dict[str, Any]:
        return {"slots": -1} if name == "hybrimoe" else options(name)

    facts = {"rates": {"cpu": 1e9, "link": 1e9, "gpu": 1e9}}
    out.mkdir()
    (out / f"gpu-facts-{LABEL}.json").write_text(json.dumps(facts))  # as a run before has left it
    with patch.object(decode, "options_of", broken):
        assert run(out, "--only", "decode", "--systems", "fiddler,hybrimoe", "--rounds", "1") == 0
    ours, other = read(out, "decode")["places"]
    assert (ours["unavailable"], other["n_turns"]) == (None, 0)
    assert "slots=-1" in other["unavailable"]


def spread(value: float) -> dict[str, float]:
    return {"median": value, "low": value, "high": value}


def decoded(system: str, tokens_per_s: float, of_bound: float | None, n: int = 1) -> dict[str, Any]:
    share = None if of_bound is None else spread(of_bound)
    place = {"model": "m", "budget_gib": 12.0, "n_sequences": n}
    return place | {"system": system, "tokens_per_s": spread(tokens_per_s), "of_bound": share}


def parts(
    *, of_bound: float = 0.9, other: float = 5.0, error: float = 0.1, overhead_s: float = 5e-5, times: float = 1.2
) -> dict[str, Any]:
    rows = [decoded("fiddler", 10.0, of_bound), decoded("fiddler", 40.0, None, 8), decoded("lru", other, 0.3)]
    return {
        "decode": {"decode": rows},
        "timeline": {"run": {"prediction": {"median": error}, "nobody_s_a_layer": overhead_s}},
        "resident": {"model": "m", "rows": [{"n_sequences": 1, "over_best": times}]},
    }


def test_what_must_be_true_is_met() -> None:
    assert [verdict.met for verdict in summary.verdicts(parts())] == [True] * 5
    assert "2.00 (m, 12 GiB, 1 sequence, lru is next)" in summary.render(summary.verdicts(parts()))


def test_what_is_not_met_is_told() -> None:
    changes = ("of_bound", 0.79), ("other", 8.0), ("error", 0.16), ("overhead_s", 61e-6), ("times", 0.99)
    for at, change in enumerate(changes):
        assert [verdict.met for verdict in summary.verdicts(parts(**dict([change])))] == [i != at for i in range(5)]


def test_what_was_not_measured_is_neither() -> None:
    assert [verdict.met for verdict in summary.verdicts({})] == [None] * 5


def test_the_bound_is_the_longest_read() -> None:
    shape = ModelShape.load("qwen3-30b-a3b")
    read = {"cpu": 4e9, "gpu": 1e9, "link": 2e9}
    reading = Reading(1.0, 5.0, [], 10, read, {"cpu": 1.0, "gpu": 1.0, "link": 0.05}, 0.5)
    found = decode.bound(reading, shape, 1, 0.0, Rates(cpu=4e10, link=2e10, gpu=1e12))
    assert (found.cpu_s, found.link_s) == (0.1, 0.05)  # no more than the link was busy
    dense = shape.resident_bytes - shape.head_bytes
    assert found.gpu_s == pytest.approx((1e9 + dense) / 1e12)
    assert found.seconds == 0.1
    of_four = decode.bound(reading, shape, 4, 0.0, Rates(1e12, 1e12, 1e12))
    assert of_four.gpu_s == pytest.approx((1e9 + dense / 4) / 1e12)
    unheard = replace(reading, hits=None)
    assert decode.knows_bytes(unheard, 1)
    assert not decode.knows_bytes(unheard, 8)
    whole = decode.bound(unheard, shape, 1, 0.0, Rates(1e12, 1e12, 1e12)).gpu_s * 1e12 - dense
    assert whole == pytest.approx(shape.n_layers * shape.top_k * shape.expert_bytes)


def test_systems_are_options_that_an_engine_takes() -> None:
    for name in Sizes().systems:
        with decode.deciding_as(name, 2):
            EngineConfig(device="cuda", **decode.options_of(name))
    assert EngineConfig(**decode.options_of("fiddler")) == EngineConfig()


def job(lane: str, start_s: float, end_s: float, layer: int | None = None) -> Span:
    return Span(lane, "L0 1 expert" if layer is not None else "dense", 7, layer, start_s, end_s, 0.0)


def test_lanes_side_by_side() -> None:
    spans = [job("gpu", 0, 2), job("gpu", 3, 5, 0), job("cpu", 1, 4, 0), job("cpu", 3, 3.75, 0)]
    spans.append(job("link", 3.5, 7, 0))
    decisions = [Decision(2.0, 7, 0, 2, 1, 1, 0, 1.0, 2.0), Decision(6.0, 7, 1, 2, 1, 1, 1, 3.0, 2.0)]
    trace = Trace(spans=spans, decisions=decisions)
    found = timeline.lanes(trace)
    assert found["busy_s"] == {"cpu": 3.0, "gpu": 4.0, "link": 3.5}
    assert found["overlap_s"]["all"] == 0.5
    assert sorted(found["overlap_s"].values()) == [0.5, 0.5, 1.5, 2.0]
    assert (found["wall_s"], found["nobody_s"]) == (7.0, 0.0)
    assert timeline.layers(decisions) == [4.0]
    assert timeline.prediction(decisions) == {"n_layers": 2, "median": 0.5, "p90": 0.5}
    assert [span.start_s for span in timeline.since(trace, 3.0).spans] == [0.0, 0.0, 0.5]


def test_a_machine_names_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(name="NVIDIA Some GPU", total_memory=80 << 30, major=9, minor=0, uuid="abc")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: known)
    monkeypatch.setenv("PATH", str(tmp_path))
    without = machine.describe()["gpu"]
    assert (without["name"], without["memory_gib"], without["driver"]) == ("NVIDIA Some GPU", 80.0, None)
    script = "#!/bin/sh\necho GPU-xyz, 1.0, 3, 8, 1\necho GPU-abc, 570.1, 5, 16, 4\n"
    smi = tmp_path / "nvidia-smi"
    smi.write_text(script)
    smi.chmod(0o755)
    found = machine.describe()["gpu"]
    assert (found["driver"], found["pcie_generation"], found["pcie_width"]) == ("570.1", "5", "16")
    about = Record({"n_cores": 16, "cpu": "Some Chip", "isa": [], "gpu": Record(found)})
    measured = Record({"bench": "gpu", "virtual": False, "machine": about})
    assert label(measured) == "16 cores, Some Chip, NVIDIA Some GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.describe()["gpu"] is None
