"""The commands in this process: what they print, what they refuse, and how they count."""

import importlib
import json
import os
import re
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import anyio
import pytest
import torch
import typer
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner, Result

from fiddler import DEMO
from fiddler.cli import app
from fiddler.cli.flags import speaking, spoken
from fiddler.cli.generate import without_newline
from fiddler.cli.notes import slots_used, virtual_speed, weights_read, where_experts_ran
from fiddler.cli.options import CheckpointOptions, EngineOptions, SamplingOptions, size_bytes
from fiddler.cli.session import interruptible, virtual_json
from fiddler.config import EngineConfig, PlannerName, PolicyName, StoreMode, WaveMode
from fiddler.errors import ConfigError
from fiddler.store.checkpoint import Checkpoint
from fiddler.types import LaneStatistics, PrefetchStatistics, Statistics
from tests.support.tiny import CONTEXT, N_EXPERTS, N_LAYERS, TOP_K, save_tiny, tiny_tokenizer

PROMPT = "Once upon"
EXPERT_BYTES = 3 * 64 * 32 * 4
VIRTUAL = "sim:rtx4090-desktop"
ACCELERATOR = (
    "slots",
    "slots_used",
    "hits",
    "fetches",
    "promotions",
    "fallbacks",
    "copied_bytes",
    "prediction_error",
)
"""Keys that are zero without an accelerator."""
COPIES = (
    r"of 6 used; \d+ hits, \d+ fetches, \d+ promotions, \d+ ahead \(\d+ used, \d+ in time.*\), [\d.]+ .B copied"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(*args: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def run_json(*args: object, stdin: str = "") -> dict[str, Any]:
    """What a command printed as its one JSON object."""
    result = run(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def answers(*args: object, stdin: str) -> list[dict[str, Any]]:
    result = run("chat", *args, "--json", "--greedy", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def n_prompt_tokens(messages: list[dict[str, str]]) -> int:
    return len(tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def test_generate_prints_one_object_that_counts_right(tiny: Path) -> None:
    answer = run_json("generate", "-m", tiny, "-p", PROMPT, "--max-new-tokens", 6, "--greedy")

    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "timing", "virtual", "experts"}
    assert len(answer["token_ids"]) == 6
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    assert set(answer["timing"]) == {"first_token_s", "total_s", "tokens_per_s"}
    assert 0 < answer["timing"]["first_token_s"] <= answer["timing"]["total_s"]
    experts = answer["experts"]
    visits = (9 + 5) * N_LAYERS * TOP_K  # the last token is not run
    assert (experts["visits"], experts["cpu_visits"], experts["accelerator_visits"]) == (visits, visits, 0)
    assert experts["bytes_read"] == experts["loads"] * EXPERT_BYTES
    assert not any(experts[name] for name in ACCELERATOR)
    assert answer["virtual"] is None


@pytest.mark.parametrize("device", ["sim", VIRTUAL])
def test_generate_counts_what_the_accelerator_did(tiny: Path, device: str) -> None:
    args = ("generate", "-m", tiny, "-p", PROMPT, "--max-new-tokens", 6, "--greedy")
    answer = run_json(*args, "--device", device, "--slots", 5, "--planner", "all-fetch")

    assert answer["text"] == run_json(*args)["text"]
    experts = answer["experts"]
    assert set(experts) > set(ACCELERATOR)
    assert experts["cpu_visits"] + experts["accelerator_visits"] == experts["visits"] == 14 * N_LAYERS * TOP_K
    assert experts["accelerator_visits"] > 0
    assert experts["slots"] == experts["slots_used"] == 5
    assert experts["copied_bytes"] % EXPERT_BYTES == 0
    n_ahead = experts["prefetch"]["n_issued"]
    n_copies = experts["slots"] + experts["fetches"] + experts["promotions"] + n_ahead  # the slots at the start
    assert 0 < experts["copied_bytes"] <= n_copies * EXPERT_BYTES
    assert experts["fallbacks"] == 0


def test_virtual_time_is_told_apart(tiny: Path) -> None:
    args = ("generate", "-m", tiny, "-p", PROMPT, "--max-new-tokens", 6, "--greedy", "--device")
    virtual, again = [run_json(*args, VIRTUAL)["virtual"] for _ in range(2)]
    shown, wall = run(*args, VIRTUAL), run(*args, "sim")

    assert virtual == again
    assert virtual["machine"] == "rtx4090-desktop"
    assert virtual["tokens_per_s"] == pytest.approx(6 / virtual["step_s"])
    line = f"{virtual['tokens_per_s']:.3g} tokens/s in virtual time on a simulated rtx4090-desktop"
    assert line in " ".join(shown.stderr.split())
    assert run_json(*args, "sim")["virtual"] is None
    assert "virtual" not in wall.stderr
    for result in (shown, wall):
        assert re.search(r"CPU \d+ %, accelerator \d+ % of 84 expert visits", result.stderr)
        assert re.search(COPIES, " ".join(result.stderr.split()))
        assert re.search(r"\d+ % median error of a layer's time", result.stderr)


def test_a_summary_of_slots_that_did_nothing() -> None:
    none = LaneStatistics(0, 0, 0, 0.0)
    counts = dict.fromkeys((f.name for f in fields(Statistics)), 0)
    lanes = {"cpu": none, "gpu": none, "link": none}
    idle = Statistics(**{**counts, **lanes, "prefetch": PrefetchStatistics(), "n_slots": 3})  # type: ignore[arg-type]

    assert where_experts_ran(idle) == "CPU 100 %, accelerator 0 % of 0 expert visits"
    assert (
        slots_used(idle)
        == "0 of 3 used; 0 hits, 0 fetches, 0 promotions, 0 ahead (0 used, 0 in time), 0 bytes copied"
    )
    resting = replace(idle, prefetch=PrefetchStatistics(n_issued=4, resting=True))
    assert "4 ahead (0 used, 0 in time, now switched off: it did not pay)" in slots_used(resting)
    assert slots_used(replace(idle, n_fallbacks=2)).endswith(", 2 fell back to the CPU")
    assert weights_read(idle) == "0 bytes in 0 expert loads"
    assert virtual_speed(3, 0.0) == "0 tokens/s in virtual time"
    assert virtual_json("m", 0, 0.0) == {"machine": "m", "step_s": 0.0, "tokens_per_s": 0.0}


def test_shares_add_up() -> None:
    none = LaneStatistics(0, 0, 0, 0.0)
    counts = dict.fromkeys((f.name for f in fields(Statistics)), 1)
    for n_cpu in range(201):
        lanes = {"cpu": replace(none, n_rows=n_cpu), "gpu": replace(none, n_rows=200 - n_cpu), "link": none}
        found = re.findall(r"(\d+) %", where_experts_ran(Statistics(**{**counts, **lanes})))  # type: ignore[arg-type]
        assert sum(int(share) for share in found) == 100


def test_engine_options_are_those_of_the_engine_s_configuration() -> None:
    plain = EngineOptions().config(CheckpointOptions())
    assert plain == EngineConfig()
    left_out = {"max_running", "trace", "record", "calibration_dir", "trust_remote_code"}
    assert {f.name for f in fields(EngineOptions)} == {f.name for f in fields(EngineConfig)} - left_out


def test_every_engine_option_is_in_the_help_and_arrives(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "device": "cuda",
        "store": "packed",
        "slots": 4,
        "vram_budget": 12_000_000,
        "policy": "lru",
        "half_life": 8.0,
        "prefetch": "off",
        "promote": False,
        "graphs": False,
        "planner": "all-cpu",
        "waves": "two",
        "defer": 1,
        "warm_start": tiny / "none.json",
        "dtype": "bfloat16",
        "expert_dtype": "int8",
        "kernels": "linear",
        "threads": 1,
        "max_context": 99,
        "kv_tokens": 77,
        "chunk_tokens": 7,
    }
    assert set(given) == {f.name for f in fields(EngineOptions)}
    names = {name: name.replace("_", "-") for name in given}
    flags = [(f"--no-{names[n]}",) if v is False else (f"--{names[n]}", v) for n, v in given.items()]
    opened: list[EngineConfig] = []

    def note(_model: object, config: EngineConfig) -> None:
        opened.append(config)
        raise ConfigError("seen")

    monkeypatch.setattr("fiddler.cli.session.Engine", note)
    run("generate", "-m", tiny, "-p", PROMPT, *(part for flag in flags for part in flag))
    assert opened == [EngineConfig(**given)]

    monkeypatch.setenv("COLUMNS", "200")
    shown = run("generate", "--help").stdout
    assert all(flag[0] in shown for flag in flags)
    for kind in (PolicyName, PlannerName, WaveMode, StoreMode):
        assert "|".join(get_args(kind)) in shown
    assert "auto|cpu|cuda|sim|sim:MACHINE" in shown


@pytest.mark.parametrize(
    ("flag", "value"), [("--policy", "lfru"), ("--planner", "two-ended"), ("--prefetch", "eager")]
)
def test_rules_of_other_systems_are_not_an_engine_s(flag: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    refused = run("generate", "-p", PROMPT, flag, value)
    assert refused.exit_code == 2
    assert f"Invalid value for '{flag}': '{value}' is not one of " in refused.stderr
    assert "fiddler simulate" in refused.stderr
    assert value in run("simulate", "--help").stdout


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1", 1),
        ("17179869184", 2**34),
        ("5B", 5),
        ("12GiB", 12 * 2**30),
        ("12G", 12 * 2**30),
        ("12GB", 12 * 10**9),
        (" 800 mib ", 800 * 2**20),
        ("1.5T", 3 * 2**39),
        ("0.1k", 102),
    ],
)
def test_sizes_are_read_in_powers_of_1024_unless_they_say_otherwise(text: str, n_bytes: int) -> None:
    assert size_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "-1", "1e9", "12GiBs", "12 G B", "1.G", "1,5G", "nan", "0", "0.5", "0G"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=re.escape(repr(text))):
        size_bytes(text)


def test_scores_are_kept_between_runs(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    args = ("generate", "-m", tiny, "-p", PROMPT, "--max-new-tokens", 4, "--device", VIRTUAL, "--warm-start", file)
    assert run(*args).exit_code == 0
    assert file.exists()
    refused = run(*args, "--policy", "lru")
    assert refused.exit_code == 1
    assert f"error: --warm-start {file}" in refused.stderr


def test_text_goes_to_stdout_and_the_summary_to_stderr(tiny: Path) -> None:
    args = ("generate", "-m", tiny, "-p", PROMPT, "--max-new-tokens", 6, "--greedy")
    shown, quiet, answer = run(*args), run(*args, "--quiet"), run_json(*args)

    assert shown.stdout == quiet.stdout == answer["text"] + "\n"
    assert quiet.stderr == ""
    assert "loading" in shown.stderr
    assert "9 prompt, 6 new" in shown.stderr
    assert f"CPU 100 % of {answer['experts']['visits']} expert visits" in shown.stderr
    assert "\x1b" not in shown.output


def test_greedy_and_seeded_runs_repeat(tiny: Path) -> None:
    args = ("generate", "-m", tiny, "-p", PROMPT, "--max-new-tokens", 12)
    greedy = [run_json(*args, "--greedy")["token_ids"] for _ in range(2)]
    seeded = [run_json(*args, "--temperature", 2, "--seed", seed)["token_ids"] for seed in (1, 1, 2)]

    assert greedy[0] == greedy[1]
    assert seeded[0] == seeded[1]
    assert seeded[1] != seeded[2]


def test_stop_text_ends_a_completion(tiny: Path) -> None:
    args = ("generate", "-m", tiny, "-p", PROMPT, "--max-new-tokens", 30, "--greedy")
    whole = run_json(*args)["text"]
    stop = whole[5]
    answer = run_json(*args, "--stop", "never comes", "--stop", stop)

    assert answer["finish_reason"] == "stop"
    assert answer["text"] == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a\r", "a\r"), ("a \n", "a "), ("a\r\r\n", "a\r"), ("", "")],
)
def test_one_final_newline_is_the_shell_s(piped: str, prompt: str) -> None:
    assert without_newline(piped) == prompt


def test_a_length_nobody_gave_shrinks_to_the_context(tiny: Path) -> None:
    answer = run_json("generate", "-m", tiny, "-p", PROMPT, "--max-context", 20)

    assert answer["usage"]["completion_tokens"] == 20 - 9


def test_ctrl_c_keeps_the_partial_object(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fiddler.cli.generate")  # `fiddler.cli` has the command under this name
    monkeypatch.setattr(module, "_ignore", lambda text: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)

    result = run("generate", "-m", tiny, "-p", PROMPT, "--max-new-tokens", 400, "--json")
    answer = json.loads(result.stdout)

    assert result.exit_code == 130
    assert answer["finish_reason"] == "interrupted"
    assert 1 <= answer["usage"]["completion_tokens"] == len(answer["token_ids"]) < 400
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_wakes_a_waiting_loop() -> None:
    async def wait() -> str:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            await anyio.sleep_forever()
        return "went on"

    assert anyio.run(wait) == "went on"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--device", "tpu"], 2, "--device"),
        (["--device", "sim:"], 2, "--device"),
        (["--device", "sim:tpu"], 1, "rtx4090-desktop"),
        (["--device", "cuda:0"], 2, "--device"),
        (["--device", "sim", "--store", "mapped"], 1, "--store mapped"),
        (["--vram-budget", "lots"], 2, "--vram-budget"),
        (["--vram-budget", "0"], 2, "--vram-budget"),
        (["--device", "cpu", "--vram-budget", "1G"], 1, "--vram-budget 1073741824"),
        (["--kv-tokens", "0"], 2, "--kv-tokens"),
        (["--kv-tokens", "9"], 1, "--kv-tokens 9"),
        (["--dtype", "int3"], 2, "--dtype"),
        (["--store", "paged"], 2, "--store"),
        (["--policy", "fifo"], 2, "--policy"),
        (["--planner", "best"], 2, "--planner"),
        (["--waves", "three"], 2, "--waves"),
        (["--slots", "-1"], 2, "--slots"),
        (["--defer", "-1"], 2, "--defer"),
        (["--defer", "1"], 1, "--defer 1"),
        (["--half-life", "-1"], 2, "--half-life"),
        (["--half-life", "0"], 1, "--half-life 0.0 must"),
        (["--half-life", "nan"], 2, "--half-life"),
        (["--half-life", "inf"], 1, "--half-life inf must"),
        (["--warm-start", "/"], 2, "--warm-start"),
        (["--temperature", "-1"], 2, "--temperature"),
        (["--top-p", "1.5"], 2, "--top-p"),
        (["--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["--max-new-tokens", "many"], 2, "--max-new-tokens"),
        (["--nonsense"], 2, "--nonsense"),
        (["--repetition-penalty", "0"], 1, "--repetition-penalty 0.0 must"),
        (["--repetition-penalty", "inf"], 1, "--repetition-penalty inf must"),
        (["--seed", "1000000000000000000000"], 1, "--seed 1000000000000000000000 must"),
        (["--threads", "32768"], 1, "--threads 32768 must be at most"),
        (["--stop", ""], 1, "--stop '' must"),
        (["--stop", "a", "--stop", ""], 1, "--stop a --stop '' must"),
        (["--max-context", "100000"], 1, "--max-context 100000 is more"),
        (["--max-new-tokens", "100000"], 1, "--max-new-tokens 100000 exceed"),
        (["--max-new-tokens", "100000"], 1, "set --max-new-tokens to at most"),
        (["--device", "sim", "--kv-tokens", "8"], 1, "set --kv-tokens higher"),
        (["--prompt", ""], 1, "prompt"),
        (["--prompt", "\udcff"], 1, "UTF-8"),
        (["--model", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_mistakes_are_named(tiny: Path, args: list[str], code: int, message: str) -> None:
    result = run("generate", "-m", tiny, "-p", PROMPT, "--json", *args)

    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert not re.search(r"\w=|\w_\w", result.stderr.replace(str(tiny), "")), "a keyword"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("store='mapped' has no blocks; leave store='auto'", "--store mapped has no blocks; leave --store auto"),
        ("set dtype to 'float32'; promote=False, graphs=True", "set --dtype to 'float32'; --no-promote, --graphs"),
        ("a model of that store has the device it has", "a model of that store has the device it has"),
        ("device='a b' (threads=3) or half_life.", "--device 'a b' (--threads 3) or --half-life."),
        ("/top_k=5/max_context: no_such_option=1", "/top_k=5/max_context: no_such_option=1"),
        ("stop_strings=['a', ''], do_sample=False", "--stop a --stop '', --greedy"),
        (
            "num_beams=4 is not supported; model = fiddler.attach(path); model.generate(...) takes it",
            "num_beams=4 is not supported",
        ),
        ("trust_remote_code=True lets it run", "--trust-remote-code lets it run"),
    ],
)
def test_errors_speak_of_flags(message: str, said: str) -> None:
    with speaking([CheckpointOptions, EngineOptions, SamplingOptions]):
        assert spoken(message) == said


def test_flags_are_those_of_the_command() -> None:
    with speaking([CheckpointOptions]):
        assert spoken("top_k=9 is more than n_experts=8") == "top_k=9 is more than n_experts=8"
    assert spoken("max_context=1") == "max_context=1"


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    config = Qwen3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=259
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    for command in ("inspect", "generate", "chat"):
        result = run(command, "-m", tmp_path)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("error: 'qwen3' has no experts")


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (save_tiny(tmp_path) / "tokenizer.json").write_text("{")
    result = run("generate", "-m", tmp_path, "-q")

    assert result.exit_code == 1
    assert result.stderr.startswith("error: the tokenizer of")


# fp32; attention, norms, routers, embeddings and head of `tiny.py`'s sizes, by hand
ATTENTION = 64 * (4 * 16 + 2 * 16 + 2 * 16) + 64 * 64
EMBEDDINGS = 259 * 64
LAYER = {
    "qwen3_moe": ATTENTION + 2 * 16 + 2 * 64 + 64 * N_EXPERTS,  # norms of queries and keys are a head wide
    "mixtral": ATTENTION + 2 * 64 + 64 * N_EXPERTS,
    "olmoe": ATTENTION + 64 + 32 + 2 * 64 + 64 * N_EXPERTS,  # here they are as wide as all heads
    "gpt_oss": ATTENTION + 4 * 16 + 2 * 2 * 16 + 64 + 4 + 2 * 64 + 64 * N_EXPERTS + N_EXPERTS,  # biases, sinks
}


@pytest.mark.parametrize("kind", sorted(LAYER))
def test_inspect_counts_by_hand(kind: str, tmp_path: Path) -> None:
    facts = run_json("inspect", "-m", save_tiny(tmp_path, kind))

    biases = 2 * 32 + 64 if kind == "gpt_oss" else 0
    expert = (3 * 64 * 32 + biases) * 4
    dense = N_LAYERS * LAYER[kind] + 64 + 2 * EMBEDDINGS
    assert facts["model_type"] == kind
    assert facts["dtype"] == "float32"
    assert facts["context"] == CONTEXT
    assert (facts["layers"], facts["moe_layers"]) == (N_LAYERS, N_LAYERS)
    assert (facts["experts_per_layer"], facts["top_k"]) == (N_EXPERTS, TOP_K)
    assert facts["bytes_per_expert"] == expert
    assert facts["experts"] == {
        "parameters": N_LAYERS * N_EXPERTS * expert // 4,
        "bytes": N_LAYERS * N_EXPERTS * expert,
    }
    assert facts["dense"] == {"parameters": dense, "bytes": dense * 4}
    assert facts["total"]["bytes"] == facts["file_bytes"] == dense * 4 + N_LAYERS * N_EXPERTS * expert
    assert facts["expert_bytes_per_token"] == N_LAYERS * TOP_K * expert
    assert facts["dense_bytes_per_token"] == (dense - EMBEDDINGS) * 4
    assert facts["packed"] is True


def test_inspect_tells_dense_layers_and_tied_embeddings(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, dtype=torch.bfloat16, mlp_only_layers=[0], tie_word_embeddings=True)
    facts = run_json("inspect", "-m", folder)

    n_moe = N_LAYERS - 1
    dense = N_LAYERS * LAYER["qwen3_moe"] - 64 * N_EXPERTS + 3 * 64 * 48 + 64 + EMBEDDINGS
    assert (facts["layers"], facts["moe_layers"], facts["dtype"]) == (N_LAYERS, n_moe, "bfloat16")
    assert facts["dense"] == {"parameters": dense, "bytes": dense * 2}
    assert facts["dense_bytes_per_token"] == dense * 2
    assert facts["expert_bytes_per_token"] == n_moe * TOP_K * EXPERT_BYTES // 2


def test_inspect_reads_no_weight_and_downloads_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "_view", refuse)
    assert run("inspect", "-m", tiny).exit_code == 0

    result = run("inspect", "-m", "somebody/something")
    assert result.exit_code == 1
    assert "hub cache" in result.stderr
    assert "fetch it with `hf download somebody/something` first" in result.stderr
    assert "local_files_only" not in result.stderr


@pytest.mark.parametrize(
    ("room", "fits", "text"),
    [
        (10**12, "ram", "fits in RAM (1.00 TB available)"),
        (100_000, "disk", "experts are mapped from disk: 100.00 kB of 589.82 kB can stay in the page cache"),
        (-1, "no", "does not fit: the dense part needs 288.38 kB of RAM"),
    ],
)
def test_inspect_says_whether_it_fits(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, room: int, fits: str, text: str
) -> None:
    dense = run_json("inspect", "-m", tiny)["dense"]["bytes"]
    monkeypatch.setattr("fiddler.cli.facts.available_bytes", lambda: room if room == 10**12 else dense + room)

    machine = run_json("inspect", "-m", tiny)["machine"]
    assert machine["fits"] == fits
    assert machine["cacheable_expert_bytes"] == min(max(room, 0), 589_824)
    assert text in " ".join(run("inspect", "-m", tiny).stdout.split())


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fiddler.cli import facts as machine

    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    unlimited = machine.available_bytes()
    for name, content in (("memory.max", "5000"), ("memory.current", "3000"), ("memory.stat", "anon 9\nfile 70\n")):
        (tmp_path / name).write_text(content)

    assert machine.available_bytes() == 2070 < unlimited


def test_chat_answers_line_by_line_and_remembers(tiny: Path) -> None:
    first, second = answers("-m", tiny, "--max-new-tokens", 5, stdin="Hello\n\nAnd you?\n")

    history = [{"role": "user", "content": "Hello"}]
    assert first["usage"] == {
        "prompt_tokens": n_prompt_tokens(history),
        "completion_tokens": 5,
        "total_tokens": n_prompt_tokens(history) + 5,
    }
    history += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "And you?"}]
    assert second["usage"]["prompt_tokens"] == n_prompt_tokens(history)
    assert first["dropped_messages"] == second["dropped_messages"] == 0


def test_chat_resets_and_exits(tiny: Path) -> None:
    stdin = "Hello\nHello\n/reset\nHello\n/exit\nHello\n"
    first, second, third = answers("-m", tiny, "--max-new-tokens", 5, "--system", "Be brief.", stdin=stdin)

    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    assert third["token_ids"] == first["token_ids"]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert third["usage"]["prompt_tokens"] == n_prompt_tokens(system)


def test_chat_drops_the_oldest_turns_with_a_note(tiny: Path) -> None:
    args = ("-m", tiny, "--max-context", 120, "--max-new-tokens", 10)
    stdin = "Tell me a story\n" * 6
    given = answers(*args, stdin=stdin)

    assert [a["usage"]["completion_tokens"] for a in given] == [10] * 6
    assert sum(a["dropped_messages"] for a in given) >= 2
    assert all(a["usage"]["total_tokens"] <= 120 for a in given)
    shown = run("chat", *args, stdin=stdin)
    assert "the oldest 2 messages were dropped" in shown.stderr
    assert shown.exit_code == 0


def test_chat_goes_on_after_a_message_it_cannot_answer(tiny: Path) -> None:
    stdin = f"Hello\n{'x' * CONTEXT}\nHello\n"
    first, refused, third = answers("-m", tiny, "--max-new-tokens", 5, stdin=stdin)

    assert "too long" in refused["error"]
    assert set(refused) == {"error"}
    assert third["usage"]["prompt_tokens"] >= first["usage"]["prompt_tokens"]


def test_chat_prints_answers_as_text(tiny: Path) -> None:
    args = ("-m", tiny, "--max-new-tokens", 5, "--greedy")
    (answer,) = answers(*args, stdin="Hello\n")
    shown = run("chat", *args, stdin="Hello\n")

    assert shown.stdout == answer["text"] + "\n"
    assert "(5 tokens" in shown.stderr


def test_chat_tells_virtual_time_apart(tiny: Path) -> None:
    args = ("-m", tiny, "--max-new-tokens", 5, "--device", VIRTUAL)
    first, second = answers(*args, stdin="Hello\nHello\n")
    shown = run("chat", *args, "--greedy", stdin="Hello\n")

    for answer in (first, second):
        virtual = answer["virtual"]
        assert virtual["machine"] == "rtx4090-desktop"
        assert virtual["tokens_per_s"] == pytest.approx(5 / virtual["step_s"])
    assert f" {first['virtual']['tokens_per_s']:.3g} tokens/s in virtual time" in shown.stderr
    (wall,) = answers("-m", tiny, "--max-new-tokens", 5, stdin="Hello\n")
    assert wall["virtual"] is None


def test_chat_needs_a_template(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    result = run("chat", "-m", tmp_path, stdin="Hello\n")

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: this checkpoint has no chat template")


def test_without_flags_the_demo_answers() -> None:
    (answer,) = answers("--max-new-tokens", 6, "--greedy", stdin="Hello\n")
    shown = run("generate", "--max-new-tokens", 6, "--greedy")
    facts = run_json("inspect")

    assert answer["text"].strip()
    assert shown.exit_code == 0
    assert shown.stdout.strip()
    assert "prompt: And it came to pass" in shown.stderr
    assert facts["folder"] == str(DEMO)
    assert facts["total"]["bytes"] == facts["file_bytes"]
