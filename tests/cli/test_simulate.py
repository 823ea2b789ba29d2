"""`fiddler simulate`: what it prints, what it refuses, and what it leaves unimported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fiddler import DEMO
from fiddler.cli import app
from fiddler.lab.machine import FIGURES, Machine, machines
from fiddler.lab.shape import ModelShape, shapes
from fiddler.lab.systems import SYSTEMS

ROOT = Path(__file__).parents[2]
SHORT = ("--prompt-tokens", 16, "--new-tokens", 5)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, args)], env={"COLUMNS": "200"})


def run_json(*args: object) -> dict[str, Any]:
    result = run(*SHORT, *args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def test_a_table_says_what_came_of_it_and_that_time_is_virtual() -> None:
    result = run(*SHORT, "--resident", 0.25)
    value = run_json("--resident", 0.25)["result"]

    assert result.exit_code == 0
    assert "virtual time" in result.stdout
    assert f"{value['tokens_per_s']:.4g} tokens/s" in result.stdout
    for row in (
        "qwen3-30b-a3b",
        "rtx4090-desktop",
        "first token",
        "lanes busy",
        "experts read",
        "promotions",
        "hits",
    ):
        assert row in result.stdout
    assert "1,536 of 6,144 experts (25 %" in result.stdout
    assert "physical bound" in result.stdout
    assert result.stderr == "simulating ...\n"


def test_one_object_has_the_setting_the_result_and_the_machine() -> None:
    value = run_json("--sequences", 2, "--waves", "one", "--no-promote", "--policy", "lru", "--slots", 100)

    assert set(value) == {"clock", "setting", "result", "shape", "machine"}
    assert value["clock"] == "virtual"
    setting = value["setting"]
    assert setting["model"] == value["shape"]["name"] == "qwen3-30b-a3b"
    assert (setting["n_slots"], setting["policy"], setting["waves"], setting["promote"]) == (
        100,
        "lru",
        "one",
        False,
    )
    assert (setting["sequences"], setting["prompt_tokens"], setting["new_tokens"]) == (2, 16, 5)
    assert setting["resident"] == 100 / 6144
    result = value["result"]
    assert result["n_decoded"] == 2 * 4
    assert result["n_promotions"] == 0
    assert result["tokens_per_s"] == pytest.approx(8 / result["decode_s"])
    assert result["of_bound"] == pytest.approx(result["bound"]["seconds"] / result["decode_s"])
    assert set(value["machine"]) == {"name", "description", *FIGURES}


def test_sources_of_the_figures_are_given_on_request() -> None:
    value, shown = run_json("--sources"), run(*SHORT, "--sources")

    assert set(value["machine"]["sources"]) == FIGURES
    assert "host_layer_s" in shown.stdout
    assert "assumed" in shown.stdout


def test_the_same_command_prints_the_same_and_another_seed_another() -> None:
    assert run_json() == run_json()
    assert run_json("--seed", 1)["result"] != run_json()["result"]


def test_slots_are_what_fits_unless_given_or_a_share() -> None:
    fits = run_json()["setting"]["n_slots"]

    assert 1536 < fits < 6144
    assert run_json("--machine", "laptop-4060")["setting"]["n_slots"] < fits
    assert run_json("--resident", 0.25)["setting"]["n_slots"] == 1536
    assert run_json("--slots", 99999)["setting"]["n_slots"] == 6144
    assert run_json("--slots", 0)["result"]["n_hits"] == 0


def test_a_list_has_a_line_for_every_machine_shape_and_system() -> None:
    lines = [line.split() for line in run("--list").stdout.splitlines()]

    known = [*machines(), *shapes(), *SYSTEMS]
    assert [line[0] for line in lines if line and line[0] in known] == known
    assert [line[0] for line in lines if line and line[0] in ("machines", "shapes", "systems")] == [
        "machines",
        "shapes",
        "systems",
    ]


def test_a_checkpoint_s_config_is_a_shape() -> None:
    value = run_json("--model", DEMO)
    config = json.loads((DEMO / "config.json").read_text())

    assert value["shape"]["name"] == DEMO.name
    assert value["shape"]["hidden"] == config["hidden_size"]
    assert value["setting"]["n_slots"] == value["shape"]["n_layers"] * value["shape"]["n_experts"]


def test_experts_are_as_large_as_the_format_that_is_asked_for() -> None:
    packed, floats = (run_json("--quant", name, "--slots", 1536) for name in ("int4", "bf16"))

    assert (packed["shape"]["quant"], floats["shape"]["quant"]) == ("int4", None)
    preloads = [value["result"]["preload_s"] for value in (packed, floats)]
    assert preloads[0] / preloads[1] == pytest.approx(4.5 / 16, rel=1e-3)
    assert packed["result"]["tokens_per_s"] > floats["result"]["tokens_per_s"]


def test_a_checkpoint_s_config_says_its_format_unless_another_is_asked_for(tmp_path: Path) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))

    assert run_json("--model", tmp_path)["shape"]["quant"] == "mxfp4"
    assert run_json("--model", tmp_path, "--quant", "bf16")["shape"]["quant"] is None


def test_experts_larger_than_host_memory_are_said_to_be() -> None:
    assert "more than there is" in run("--shape", "deepseek-v3", "--slots", 0).stdout
    assert "more than there is" not in run("--shape", "gpt-oss-20b").stdout


def test_files_of_ones_own_are_read(tmp_path: Path) -> None:
    machine = json.loads((ROOT / "fiddler/machines/rtx4090-desktop.json").read_text())
    machine["link_bytes_per_s"]["value"] *= 2
    (tmp_path / "faster.json").write_text(json.dumps(machine))
    value = run_json("--machine", tmp_path / "faster.json", "--shape", ROOT / "fiddler/shapes/mixtral-8x7b.json")

    assert value["machine"]["name"] == "faster"
    assert value["machine"]["link_bytes_per_s"] == 2 * Machine.load("rtx4090-desktop").link_bytes_per_s
    assert value["setting"]["model"] == "mixtral-8x7b"


def test_experts_are_drawn_as_a_file_counts_them(tmp_path: Path) -> None:
    """One expert a layer that takes half of all visits: with a slot for each, half of all loads are hits."""
    shape = ModelShape.load("mixtral-8x7b")
    counts = [[700] + [100] * 7 for _ in range(shape.n_layers)]
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"total_input_tokens": 700, "expert_popularity": counts}))
    args = ("--shape", "mixtral-8x7b", "--slots", 32, "--planner", "all-cpu", "--new-tokens", 24)

    drawn, made_up = run_json(*args, "--routing", file), run_json(*args)

    assert drawn["setting"]["routing"] == str(file)
    shares = [v["result"]["n_hits"] / (v["result"]["n_hits"] + v["result"]["n_cpu"]) for v in (drawn, made_up)]
    assert shares[0] > max(shares[1], 0.35)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--shape", "gpt-6"), "error: --shape: no profile 'gpt-6'; give"),
        (("--shape", ""), "error: --shape: no profile ''; give"),
        (("--machine", "abacus"), "error: --machine: no profile 'abacus'; give"),
        (("--system", "abacus"), "error: --system: unknown system 'abacus'; known: fiddler,"),
        (("--routing", "magic"), "error: --routing: unknown routing 'magic'; known: synthetic,"),
        (("--routing", ROOT / "fiddler/shapes/mixtral-8x7b.json"), "expert_popularity"),
        (("--slots", 1, "--resident", 0.5), "give one"),
        (("--shape", "mixtral-8x7b", "--model", DEMO), "give one"),
        (("--model", ROOT / "nowhere"), "error: --model: "),
        (("--model", ROOT / "fiddler/machines/laptop-4060.json"), "lacks"),
        (("--quant", "int5"), "error: --quant int5 is unknown; known: fp8, fp8-rows"),
        (("--half-life", 0), "--half-life is"),
        (("--timeline", "run.txt"), "error: --timeline: run.txt: a timeline is a .json"),
        (
            ("--shape", "deepseek-v2-lite", "--machine", "laptop-4060", "--prompt-tokens", 200000),
            "error: --sequences, --prompt-tokens or --machine: deepseek-v2-lite needs",
        ),
        (("--sequences", 10**20), "error: --sequences times --prompt-tokens and --new-tokens: 19,2"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(args: tuple[object, ...], message: str) -> None:
    result = run(*args)

    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert result.stdout == ""


def test_a_gguf_file_is_no_shape(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0\xff")
    result = run("--model", file)
    assert result.exit_code == 1
    assert "is GGUF, whose shape is not read; give the model's config.json, and --quant" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("--sequences", 0),
        ("--resident", 1.5),
        ("--slots", -1),
        ("--nonsense",),
        ("--policy", "magic"),
        ("--planner", "magic"),
        ("--prefetch", ""),
        ("--waves", "three"),
    ],
)
def test_impossible_values_are_usage_errors(args: tuple[object, ...]) -> None:
    result = run(*args)

    assert result.exit_code == 2
    assert str(args[0]) in result.stderr


def test_counts_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    file.write_text('{"expert_popularity": [[1, 2], [3, 4]]}')
    result = run("--routing", file)

    assert result.exit_code == 1
    assert "2 layers of 2 experts, qwen3-30b-a3b has 48 layers of 128 experts" in result.stderr


def test_a_timeline_is_written_as_a_trace_and_as_a_picture(tmp_path: Path) -> None:
    trace, picture = tmp_path / "run.json", tmp_path / "run.png"
    shown = run(*SHORT, "--timeline", trace)
    run_json("--timeline", picture, "--window", 20)

    value = json.loads(trace.read_text())
    assert "qwen3-30b-a3b on rtx4090-desktop, in virtual time" in value["otherData"].values()
    assert {event["cat"] for event in value["traceEvents"] if event["ph"] == "X"} >= {"dense", "slots", "cpu"}
    assert f"timeline: {trace}" in shown.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("args", [["--json"], ["--list"], ["--model", str(DEMO)], ["--timeline", "-"], ["--help"]])
def test_torch_is_not_imported(args: list[str], tmp_path: Path) -> None:
    args = [str(tmp_path / "run.json") if arg == "-" else arg for arg in args]
    command = ["simulate", "--new-tokens", "2", "--prompt-tokens", "2", *args]
    code = (
        "import sys\nfrom fiddler.cli import app\n"
        f"try:\n    app({command!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'greenlet', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert result.returncode == 0, result.stderr
