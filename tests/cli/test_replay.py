"""`fiddler replay`: its table, its object, its picture, what it refuses, and what it leaves unimported."""

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from fiddler.cli import app
from fiddler.cli.curves import spread
from fiddler.lab.policies import POLICIES
from fiddler.lab.replay import BOUNDS, belady
from fiddler.lab.synthetic import SyntheticRouting
from fiddler.lab.traces import load, save
from fiddler.recording import Recording, RoutingTrace, visits

SHORT = ("--shape", "mixtral-8x7b", "--tokens", 12)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, args)], env={"COLUMNS": "80"})


def run_json(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two conversations and a program, of a model of three layers."""
    routing = SyntheticRouting(3, 8, 2)
    names = ("chat/0", "chat/1", "python/0")
    recordings = tuple(Recording(name, 10, routing.sequence(i, 25)) for i, name in enumerate(names))
    file = tmp_path / "three.safetensors"
    save(file, RoutingTrace("small", (8, 8, 8), recordings))
    return file


def test_a_table_has_a_row_a_policy_the_best_first_and_three_columns_a_size() -> None:
    result = run(*SHORT)
    value = run_json(*SHORT)["traces"][0]

    assert result.exit_code == 0
    assert result.stderr == "replaying ...\n"
    lines = result.stdout.splitlines()
    assert lines[0] == "mixtral-8x7b (synthetic, seed 0): 1 sequence, 12 tokens, 32 layers, 256 experts"
    assert lines[2].split() == [
        *("12.5", "%", "32", "slots"),
        *("25", "%", "64", "slots"),
        *("50", "%", "128", "slots"),
    ]
    assert lines[3].split() == ["policy", *(3 * ["hits", "%", "reads", "ratio"])]
    rows = [line for line in lines[4:] if "%" not in line and ":" not in line and line]
    assert [row.split("  ")[0].strip() for row in rows] == [policy["policy"] for policy in value["policies"]]
    assert {policy["policy"] for policy in value["policies"]} == {*BOUNDS, *POLICIES}
    ratios = [policy["mean_ratio"] for policy in value["policies"]]
    assert ratios == sorted(ratios)
    size = value["policies"][-1]["sizes"][0]
    assert f"{100 * size['hit_rate']:.1f}" in rows[-1]
    assert f"{size['reads_per_token']:.1f}" in rows[-1]


def test_one_object_has_every_trace_policy_and_size(trace: Path) -> None:
    value = run_json(trace, "--resident", 0.5, "--resident", 0.25, "--policy", "lru", "--half-life", 8)

    assert value["half_life"] == 8
    (found,) = value["traces"]
    assert (found["name"], found["model"], found["n_experts"]) == (trace.name, "small", [8, 8, 8])
    assert (found["n_sequences"], found["n_tokens"]) == (3, 75)
    policies = {policy["policy"]: policy for policy in found["policies"]}
    assert set(policies) == {*BOUNDS, "lru"}
    assert {name for name, policy in policies.items() if policy["knows_the_future"]} == set(BOUNDS)
    played = list(visits(load(trace).recordings))
    for size, (n_slots, resident) in zip(policies["belady"]["sizes"], [(6, 0.25), (12, 0.5)], strict=True):
        bound = belady(played, n_slots)
        assert size == {
            "resident": resident,
            "n_slots": n_slots,
            "n_hits": bound.n_hits,
            "n_misses": bound.n_misses,
            "hit_rate": bound.hit_rate,
            "reads_per_token": bound.n_misses / 75,
            "ratio": 1.0,
        }
    ratios = [size["ratio"] for size in policies["lru"]["sizes"]]
    assert policies["lru"]["mean_ratio"] == sum(ratios) / 2 >= 1


def test_sequences_are_chosen_by_name_and_prompts_cut_in_chunks(trace: Path) -> None:
    chats = run_json(trace, "--names", "chat/*", "--policy", "lru")["traces"][0]
    assert (chats["n_sequences"], chats["n_tokens"]) == (2, 50)
    whole, cut = (
        run_json(trace, "--policy", "lru", "--chunk-tokens", n)["traces"][0]["policies"][0]["sizes"][0]
        for n in (512, 1)
    )
    assert whole["n_hits"] + whole["n_misses"] < cut["n_hits"] + cut["n_misses"]


def test_each_trace_is_a_replay_of_its_own(trace: Path) -> None:
    value = run_json(trace, trace, "--policy", "lfu")
    assert value["traces"][0] == value["traces"][1]
    assert run(trace, trace, "--policy", "lfu").stdout.count("small (three.safetensors): 3 sequences") == 2


def test_made_up_routing_follows_the_seed_and_the_counts(tmp_path: Path) -> None:
    few = ("--policy", "lru", "--resident", 0.25)
    assert run_json(*SHORT, *few) == run_json(*SHORT, *few, "--seed", 0)
    assert run_json(*SHORT, *few) != run_json(*SHORT, *few, "--seed", 1)
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({"expert_popularity": [[1000, 1000, 1, 1, 1, 1, 1, 1]] * 32}))
    drawn = run_json(*SHORT, *few, "--routing", counts)["traces"][0]["policies"][-1]
    assert drawn["sizes"][0]["hit_rate"] > 0.8


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_written(suffix: str, trace: Path, tmp_path: Path) -> None:
    file = tmp_path / f"ratios.{suffix}"
    result = run(trace, trace, "--policy", "lru", "--policy", "lfu", "--plot", file)
    assert result.exit_code == 0, result.stderr
    assert f"plot: {file}" in result.stderr.replace("\n", "")
    begins = file.read_bytes()[:300]
    assert begins.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in begins or b"<?xml" in begins


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("--half-life", "0"), "--half-life is"),
        (("--names", "chat/*"), "--names chooses from recorded routing: give a file"),
        (("--plot", "ratios.txt"), "error: --plot: ratios.txt: a plot is one of"),
        (("--plot", "nowhere/ratios.png"), "there is no folder nowhere"),
        (("nothing.safetensors",), "nothing.safetensors"),
        (("nothing.safetensors", "--seed", "0"), "leave them or the files out"),
        (("--tokens", 10**20), "error: --tokens: 100,000,000,000,000,000,000 tokens are more than"),
        (("--routing", "nothing.json"), "error: --routing: unknown routing"),
        (("--routing", ""), "error: --routing: unknown routing"),
        (("--shape", "nothing"), "error: --shape: no profile 'nothing'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(args: tuple[str, ...], complaint: str) -> None:
    result = run(*args)
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_a_policy_that_there_is_not_is_a_usage_error() -> None:
    result = run("--policy", "lru", "--policy", "best")
    assert result.exit_code == 2
    assert "--policy" in result.stderr
    assert "'best' is not one of aged-lfu" in result.stderr


def test_a_name_that_nothing_has_is_refused(trace: Path) -> None:
    assert "no tokens of a sequence that --names 'poetry/*' chooses" in run(trace, "--names", "poetry/*").stderr


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fiddler.cli import app\n"
        "done = CliRunner().invoke(app, ['replay', '--shape', 'mixtral-8x7b', '--tokens', '3'])\n"
        "assert done.exit_code == 0; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(places=st.lists(st.floats(0, 1), max_size=12).map(sorted), gap=st.floats(0.01, 0.2))
def test_labels_are_spread_and_stay_near(places: list[float], gap: float) -> None:
    spread_out = spread(places, gap)
    assert len(spread_out) == len(places)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(spread_out))
    assert sum(spread_out) == pytest.approx(sum(places), abs=1e-9)
    if all(b - a >= gap for a, b in pairwise(places)):
        assert spread_out == places
