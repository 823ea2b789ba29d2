"""`fiddler record`: prompts from flags and files, the file it writes, and what it says of it."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fiddler.cli import app, session
from fiddler.cli.record import DEMO_PROMPTS, read_prompts
from fiddler.errors import ConfigError, PromptError
from fiddler.lab.traces import load
from fiddler.recording import Recording, RoutingTrace, foreseen, recurrence
from fiddler.steps.stream import TokenStream
from tests.support.tiny import N_EXPERTS, N_LAYERS, TOP_K, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["record", *(str(arg) for arg in args)])


def run_json(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert not result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def test_it_prints_one_object_about_the_file_it_wrote(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "routing.safetensors"
    printed = run_json("-m", tiny, "-p", "Hello", "-p", "Once", "-o", file, "--max-new-tokens", 4, "--greedy")
    trace = load(file)

    assert [r.name for r in trace.recordings] == ["0", "1"]
    assert [len(r.experts) for r in trace.recordings] == [5 + 3, 4 + 3]  # the last token is not run
    assert printed["sequences"] == [
        {"name": "0", "prompt_tokens": 5, "decode_tokens": 3},
        {"name": "1", "prompt_tokens": 4, "decode_tokens": 3},
    ]
    assert (printed["prompt_tokens"], printed["decode_tokens"]) == (9, 6)
    assert (printed["model"], printed["layers"], printed["top_k"]) == (tiny.name, N_LAYERS, TOP_K)
    assert printed["experts"] == [N_EXPERTS] * N_LAYERS
    assert (printed["file"], printed["file_bytes"]) == (str(file), file.stat().st_size)
    assert printed["recurrence"]["chance"] == printed["look_ahead"]["chance"] == TOP_K / N_EXPERTS
    assert printed["look_ahead"]["by_layer"][0] is None
    assert printed["interrupted"] is False


def test_its_former_name_still_works_and_is_not_in_the_help(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "routing.safetensors"
    options = ["-m", str(tiny), "-p", "Hello", "-o", str(file), "--max-new-tokens", "4", "--greedy", "--json"]
    now, before = (CliRunner().invoke(app, [name, *options]) for name in ("record", "trace"))
    assert now.exit_code == before.exit_code == 0
    assert json.loads(now.stdout) == json.loads(before.stdout)
    shown = CliRunner().invoke(app, ["--help"]).stdout.split()
    assert "record" in shown
    assert "trace" not in shown


def test_it_prints_a_table(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "routing.safetensors"
    result = run("-m", tiny, "-p", "Hello", "-o", file, "--max-new-tokens", 4, "--device", "sim:rtx4090-desktop")
    shown = " ".join(result.stdout.split())

    assert result.exit_code == 0, result.stderr
    for text in (
        "sequences 1 ",
        "tokens 5 prompt, 3 decode",
        "8 a layer, a token visits up to 2",
        "(chance: 25.0 %)",
    ):
        assert text in shown
    assert "loading" in result.stderr


def test_prompts_come_from_files(tiny: Path, tmp_path: Path) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("Hello\n\nOnce upon\u2028a time\r\n")
    chat = [{"role": "user", "content": "Hello"}]
    objects.write_text(
        "".join(json.dumps(o) + "\n" for o in ({"prompt": chat, "name": "chat/0"}, {"prompt": [5, 6]}))
    )

    assert read_prompts(["Hi"], lines, demo=True) == [("0", "Hi"), ("1", "Hello"), ("2", "Once upon\u2028a time")]
    named = [("chat/0", chat), ("1", [5, 6])]
    assert read_prompts([], objects, demo=False) == named
    printed = run_json("-m", tiny, "--prompts", objects, "-o", tmp_path / "out", "--max-new-tokens", 2)
    assert [s["name"] for s in printed["sequences"]] == ["chat/0", "1"]
    assert printed["sequences"][1]["prompt_tokens"] == 2


def test_the_demo_model_has_prompts_of_its_own(tmp_path: Path) -> None:
    printed = run_json("-o", tmp_path / "out", "--max-new-tokens", 8, "--greedy")

    assert [s["name"] for s in printed["sequences"]] == [name for name, _ in DEMO_PROMPTS]
    assert printed["model"] == "demo"
    assert printed["recurrence"]["share"] > printed["recurrence"]["chance"]
    assert printed["look_ahead"]["share"] > 0.5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("prompts.csv", b"Hello\n", "must be a .txt file"),
        ("prompts.txt", b"\xff\xfe", "cannot be read"),
        ("prompts.txt", b"\n", "there is no prompt"),
        ("prompts.jsonl", b'{"prompt": "Hi"}\n{"prompt"', "line 2 is not JSON"),
        ("prompts.jsonl", b'"Hi"', "line 1 must be an object"),
        ("prompts.jsonl", b'{"text": "Hi"}', "line 1 must be an object"),
        ("prompts.jsonl", b'{"prompt": "Hi", "name": 3}', "line 1: 'name' must be a text"),
        ("prompts.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        read_prompts([], tmp_path / name, demo=True)


def test_text_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi", "name": "\\ud800"}')
    with pytest.raises(PromptError, match="not valid UTF-8"):
        read_prompts([], tmp_path / "prompts.jsonl", demo=False)
    with pytest.raises(PromptError, match="not valid UTF-8"):
        read_prompts(["\ud800"], None, demo=False)


def test_what_cannot_be_run_or_written_is_an_error(tiny: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for args, message in (
        (("-m", tiny, "-p", "Hi", "-o", tmp_path / "pipe"), "cannot be written: it is not a regular file"),
        (("-m", tiny, "-o", tmp_path / "out"), "there is no prompt"),
        (("-m", tiny, "-p", "Hi", "-o", tmp_path), f"error: --output: {tmp_path} cannot be written: there is a"),
        (("-m", tiny, "--prompts", tmp_path, "-o", tmp_path / "out"), f"error: --prompts: {tmp_path} must be a"),
        (("-m", tiny, "-p", "Hi", "-o", tmp_path / "none" / "out"), "cannot be written: there is no folder"),
        (("-m", tiny, "-p", "Hi", "-p", "", "-o", tmp_path / "out"), "prompt '1': "),
    ):
        result = run(*args)
        assert result.exit_code == 1
        assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "pipe").is_fifo(), "a file took its place"


def test_ctrl_c_keeps_what_there_is(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    following = TokenStream.__anext__

    async def interrupted(stream: TokenStream) -> Any:
        token = await following(stream)
        os.kill(os.getpid(), signal.SIGINT)
        return token

    monkeypatch.setattr(TokenStream, "__anext__", interrupted)
    result = run(
        "-m", tiny, "-p", "Hello", "-p", "Hello", "-o", tmp_path / "out", "--max-new-tokens", 400, "--json"
    )

    assert result.exit_code == 130
    assert json.loads(result.stdout)["interrupted"] is True
    first = load(tmp_path / "out").recordings[0]
    assert first.n_prompt == 5 <= len(first.experts) < 5 + 399


def test_ctrl_c_before_anything_ran_writes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = RoutingTrace("tiny", (4,), ())

    async def interrupted(*_args: Any, **_options: Any) -> tuple[RoutingTrace, bool]:
        return nothing, True

    monkeypatch.setattr(session, "record", interrupted)
    result = run("-m", tiny, "-p", "Hello", "-o", tmp_path / "out")

    assert result.exit_code == 130
    assert "nothing was recorded" in result.stderr
    assert not (tmp_path / "out").exists()


def test_shares_by_hand() -> None:
    experts = np.array([[[0, 1], [2, -1]], [[1, 3], [2, -1]], [[0, 2], [3, -1]]], np.int16)
    ahead = np.array([[[-1, -1], [2, -1]], [[-1, -1], [1, -1]], [[-1, -1], [-1, -1]]], np.int16)
    one = Recording("one", 1, experts, None, ahead)
    trace = RoutingTrace("tiny", (4, 8), (one, replace(one, experts=experts[:1], ahead=None)))

    again, seen = recurrence(trace), foreseen(trace)
    assert again is not None
    assert seen is not None
    assert again.by_layer == (1 / 4, 1 / 2)
    assert again.share == 2 / 6
    assert again.chance == pytest.approx((4 * 2 / 4 + 2 * 1 / 8) / 6)
    assert seen.by_layer == (None, 1 / 2)
    assert (seen.share, seen.chance) == (1 / 2, 1 / 8)
    assert recurrence(replace(trace, recordings=trace.recordings[1:])) is None
    assert foreseen(replace(trace, recordings=trace.recordings[1:])) is None
