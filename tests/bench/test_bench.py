"""The benches run and their reports have the promised shape; no time is asserted."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM

import fiddler
from bench import formats, kernels, latency, lookahead, packed
from bench.contest import ours
from bench.report import Spread, table
from bench.workload import Run, Workload
from fiddler import EngineConfig, Token
from fiddler.devices.native import native
from fiddler.models.loaded import load
from tools import synthesize

TINY = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": TINY | {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2},
    "mixtral-8x7b": TINY | {"intermediate_size": 48, "num_local_experts": 4},
}
MACHINE = {"cpu", "n_cores", "isa", "ram_gib", "torch", "transformers", "fiddler", "threads", "commit", "date"}
QUICK = ["--set-mib", "1"]
VARIANTS = ("1 hidden as the experts get it", "1, two layers ahead", "transitions, of other domains")


def tiny(name: str, folder: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    config = synthesize.config_of(f"{name}:layers=2", **OVERRIDES[name])
    return config, synthesize.write(config, folder, **options)


@pytest.mark.parametrize("name", synthesize.MODELS)
def test_a_synthetic_checkpoint_is_what_transformers_expects(name: str, tmp_path: Path) -> None:
    config, folder = tiny(name, tmp_path / "model", shard_bytes=20_000)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in synthesize.tensors(config))


@pytest.mark.parametrize("name", synthesize.MODELS)
def test_published_shapes(name: str) -> None:
    config = synthesize.config_of(name)
    published, n_layers = synthesize.MODELS[name]
    n_expert_bytes = sum(p.nbytes for p in synthesize.tensors(config) if ".experts." in p.name)
    assert n_expert_bytes >= 4e9
    assert config["num_hidden_layers"] == n_layers
    share = config["vocab_size"] / published["vocab_size"]
    assert share == pytest.approx(n_layers / published["num_hidden_layers"], rel=0.02)


def test_gate_and_up_are_one_matrix_where_the_hub_has_them_back_to_back(tmp_path: Path) -> None:
    for name, n_up in (("qwen3-30b-a3b", 1), ("mixtral-8x7b", 2)):
        _, folder = tiny(name, tmp_path / name)
        loaded = load(folder, EngineConfig())
        assert {len(loaded.weights(layer, 0).up) for layer in range(2)} == {n_up}


def test_a_complete_checkpoint_is_kept_and_another_never_overwritten(tmp_path: Path) -> None:
    _, folder = tiny("mixtral-8x7b", tmp_path / "model")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    tiny("mixtral-8x7b", folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    with pytest.raises(ValueError, match="something else"):
        tiny("mixtral-8x7b", folder, seed=1)


@pytest.mark.parametrize(
    "spec", ["gpt-4", "mixtral-8x7b:layers=0", "mixtral-8x7b:experts=2", "mixtral-8x7b:layers="]
)
def test_an_unknown_spec_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="NAME"):
        synthesize.config_of(spec)


def test_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if native() is None:
        pytest.skip("this machine has no gcc")
    file = tmp_path / "packed.json"
    packed.main(
        ["--shape", "qwen3-30b-a3b", "--rows", "1", "--format", "mxfp4", "--set-mib", "1", "--json", str(file)]
    )
    report = json.loads(file.read_text())
    assert [cell["format"] for cell in report["experts"]] == ["bf16", "mxfp4"]
    assert all(cell["us"] > 0 for cell in report["experts"])
    assert "Read ceiling" in capsys.readouterr().out


def test_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "formats.json"
    formats.main(["--formats", "bf16,mxfp4", "--prompt", "4", "--new", "3", "--json", str(file)])
    cells = json.loads(file.read_text())["cells"]
    assert [cell["format"] for cell in cells] == ["bf16", "mxfp4"] * 4
    assert [cell["share"] for cell in cells[:4]] == [0.25] * 4
    assert cells[4]["share"] < cells[5]["share"]
    assert "virtual time" in capsys.readouterr().out


def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    kernels.main(["--shape", "128x64", "--rows", "1,4", "--passes", "2", *QUICK, "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["machine"].keys() >= MACHINE
    assert report["read_ceiling_gbs"] == max(way["high"] for way in report["ways_to_read"].values())
    anywhere = {("linear", 1), ("linear", 4), ("rows_last", 1), ("rows_last", 4), ("mv", 1)}
    ours = {("native", 1), ("native", 4)} if native() is not None else set()
    assert {(r["kernel"], r["n_rows"]) for r in report["kernels"]} == anywhere | ours
    assert [e["n_rows"] for e in report["experts"]] == [1, 4]
    assert "of_ceiling" in capsys.readouterr().out


SCENARIOS = ("single", "concurrent", "prefill", "beam")


def test_latency_beside_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = tiny("qwen3-30b-a3b", tmp_path / "model")
    report = _latency(folder, tmp_path, "--scenario", ",".join(SCENARIOS), "--concurrency", "2", "--beams", "3")
    systems = {(s["system"], s["scenario"]): s for s in report["systems"]}
    assert systems.keys() == {(name, scenario) for name in ("fiddler", "eager") for scenario in SCENARIOS}
    assert {s["fiddler_is_times"] for (name, _), s in systems.items() if name == "fiddler"} == {1.0}
    for (_, scenario), row in systems.items():
        assert (row["n_sequences"], row["n_beams"]) == {"concurrent": (2, 1), "beam": (1, 3)}.get(scenario, (1, 1))
        assert row["first_token_s"]["median"] > 0
        assert (row["decode_tokens_per_s"] is None) == (scenario == "prefill")
        assert (row["of_limit"] is None) == (scenario == "beam")
    parts = ("experts, kernels alone", "experts, in the lane", "experts, whole call")
    parts += ("attention, router, norms", "output layer")
    assert {(p["part"], p["n_sequences"]) for p in report["parts"]} == {(p, n) for n in (1, 2) for p in parts}
    assert [o["n_sequences"] for o in report["overhead"]] == [1, 2]
    out = capsys.readouterr().out
    assert "2 concurrent requests make" in out
    assert "Beam search, 3 beams" in out


def test_beam_search_on_a_described_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        latency.main(["--demo", *QUICK, "--device", "sim:rtx4090-desktop", "--scenario", "beam"])
    assert "device cpu" in capsys.readouterr().err


def test_latency_grid(tmp_path: Path) -> None:
    lengths = ("--scenario", "single", "--input-tokens", "2,5", "--output-tokens", "3,4")
    report = _latency(fiddler.DEMO, tmp_path, *lengths, peers="none")
    assert [(s["system"], s["n_input"], s["n_output"]) for s in report["systems"]] == [
        ("fiddler", n_input, n_output) for n_input in (2, 5) for n_output in (3, 4)
    ]


def test_latency_on_a_described_machine_is_virtual_and_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--device", "sim:rtx4090-desktop", "--scenario", "single")
    reports = [_latency(fiddler.DEMO, tmp_path, *options) for _ in range(2)]
    assert reports[0]["virtual"]
    assert reports[0]["systems"] == reports[1]["systems"]
    ours, eager = reports[0]["systems"]
    assert ours["decode_tokens_per_s"]["median"] > 0
    assert "CPU alone" in eager["unavailable"]
    assert "VIRTUAL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--compare", "no_such", "llama.cpp"),
        ("--scenario", "no_such", "prefill"),
        ("--device", "no_such", "'sim'"),
        ("--input-tokens", "many", "N,N"),
        ("--beams", "0", "begin at 1"),
    ],
)
def test_what_latency_does_not_know_is_named(
    option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        latency.main(["--demo", *QUICK, option, value])
    assert says in capsys.readouterr().err


def test_a_probe_is_answered_by_an_engine_that_was_waiting() -> None:
    async def ask() -> int:
        async with fiddler.Engine(fiddler.DEMO) as engine:
            await anyio.sleep(0.2)  # by then its thread waits for something to come
            probe = ours.Probe(engine)
            try:
                with anyio.fail_after(60):
                    return await probe.call(lambda: 7)
            finally:
                probe.close()

    assert anyio.run(ask) == 7


def _latency(folder: Path, tmp_path: Path, *options: str, peers: str = "eager") -> dict[str, Any]:
    file = tmp_path / "latency.json"
    short = ["--input-tokens", "3", "--output-tokens", "4", "--repeats", "1", "--compare", peers]
    latency.main(["--model", str(folder), *short, *QUICK, *options, "--json", str(file)])
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_lookahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"one": [[*range(100, 112)]], "other": [[*range(300, 312)]]}
    monkeypatch.setattr(lookahead, "held_out", lambda *_: texts.items())
    lookahead.main(["--json", str(tmp_path / "lookahead.json")])
    report = json.loads((tmp_path / "lookahead.json").read_text())
    assert report["n_tokens"] == {"one": 12, "other": 12}
    recall = report["recall"]
    assert recall["the look-ahead"] == recall["1 hidden as the experts get it, x1"]  # the model's routers are plain
    assert all(recall[f"{name}, x1"]["mean"] <= recall[f"{name}, x2"]["mean"] for name in VARIANTS)
    assert "Visits known a layer early" in capsys.readouterr().out


def test_prompts_repeat_and_differ_by_seed() -> None:
    workload = Workload(n_sequences=2, n_input=5, n_output=3, n_vocabulary=100)
    assert workload.prompts(1) == workload.prompts(1)
    assert workload.prompts(1) != workload.prompts(2)
    assert all(0 <= token < 100 for prompt in workload.prompts(1) for token in prompt)


def test_rates_count_what_they_say() -> None:
    run = Run(first_token_s=1.0, decode_s=3.0, n_sequences=2, n_output=4)
    assert run.tokens_per_s == 2.0
    assert run.decode_tokens_per_s == 2.0
    assert Run(None, 3.0, 2, 4).tokens_per_s is None


class Starved:
    """An engine whose tokens were made a second apart, and are read all at once."""

    def __init__(self) -> None:
        self.began_s = perf_counter()

    async def generate_stream(self, prompt: list[int], max_new_tokens: int, **_: Any) -> AsyncIterator[Token]:
        await anyio.sleep(0.0)
        for number in range(max_new_tokens):
            yield Token(number, "", made_s=self.began_s + 1.0 + number)


def test_rates_are_of_when_tokens_were_made_not_of_when_they_were_read() -> None:
    run = anyio.run(ours.run, Starved(), Workload(n_sequences=3, n_input=2, n_output=5, n_vocabulary=9), 1)
    assert run.decode_tokens_per_s == pytest.approx(3 * 4 / 4)
    assert run.first_token_s == pytest.approx(1.0, abs=0.1)


def test_tables_line_up() -> None:
    assert f"{Spread.of([3.0, 1.0, 2.0]):.1f}" == "2.0 (1.0 to 3.0)"
    lines = table("Title", ("name", "n"), [("a", "1"), ("long name", "100")]).splitlines()
    assert lines[1] == "Title"
    assert lines[-1] == "long name  100"
