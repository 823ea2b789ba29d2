"""The command line as a process: signals, pipes, exit codes, and what it imports."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO

import pytest

import fiddler
from tests.support.processes import wait_until_gone
from tests.support.tiny import save_tiny
from tests.support.warm import warm

FIDDLER = (sys.executable, "-m", "fiddler")
ROOT = Path(__file__).parents[2]
LONG = "4000"
"""More tokens than are made before a signal arrives."""
PATIENCE = 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192))


@pytest.fixture(scope="module")
def forked(_cache: Path) -> Iterator[tuple[str, ...]]:
    """`fiddler` without the seconds that imports take, where no signal is sent."""
    with warm({"XDG_CACHE_HOME": str(_cache)}) as command:
        yield command


def run(
    *args: str, stdin: bytes | None = None, program: tuple[str, ...] = FIDDLER
) -> subprocess.CompletedProcess[bytes]:
    given = subprocess.DEVNULL if stdin is None else subprocess.PIPE
    with started(*args, stdin=given, program=program) as process:
        stdout, stderr = process.communicate(stdin, timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@contextmanager
def started(
    *args: str,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    environment: Mapping[str, str] = MappingProxyType({}),
    program: tuple[str, ...] = FIDDLER,
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*program, *args],
        cwd=ROOT,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )
    try:
        with process:
            yield process
    finally:
        process.kill()


def pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["--version"], ["generate", "--device", "x"]])
def test_nothing_heavy_is_imported_before_a_command_runs(args: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *FIDDLER[1:], *args]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)

    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import")}
    assert "fiddler.cli" in imported
    assert not {"torch", "transformers", "numpy", "anyio", "huggingface_hub"} & imported


def test_ctrl_c_has_its_handler_before_anything_that_takes_time_is_imported() -> None:
    code = (
        "import signal, sys; before = set(sys.modules)\n"
        "def first(*_): print(*sorted(set(sys.modules) - before)); sys.stdout.flush(); raise SystemExit\n"
        "signal.signal = first; from fiddler.cli import app; app()"
    )
    imported = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True).stdout

    assert "fiddler.cli" in imported.split()
    assert not {"pathlib", "dataclasses", "fiddler.config", "fiddler.cli.terminal"} & set(imported.split())


def test_version() -> None:
    assert run("--version").stdout.decode().strip() == f"fiddler {fiddler.__version__}"


def test_a_piped_prompt_is_the_same_as_a_given_one(tiny: str, forked: tuple[str, ...]) -> None:
    options = ("generate", "-m", tiny, "--max-new-tokens", "8", "--greedy", "-q")
    piped = run(*options, stdin="Où\nça".encode())
    given = run(*options, "-p", "Où\nça", program=forked)

    assert piped.returncode == given.returncode == 0
    assert piped.stdout == given.stdout != b"\n"
    assert piped.stderr == b""


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"\xff\xfe", b"error: the prompt is not valid UTF-8"),
        (b"", b"empty"),
        (b"\n", b"empty"),
        (b"\r\n", b"empty"),
    ],
)
def test_a_piped_prompt_that_is_none_is_refused(
    tiny: str, stdin: bytes, message: bytes, forked: tuple[str, ...]
) -> None:
    result = run("generate", "-m", tiny, "-q", stdin=stdin, program=forked)

    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count(b"\n") == 1


def test_a_piped_prompt_loses_its_final_newline(tiny: str, forked: tuple[str, ...]) -> None:
    options = ("generate", "-m", tiny, "--max-new-tokens", "1", "--json")
    piped = run(*options, stdin=b"a\n \r\n", program=forked)

    assert json.loads(piped.stdout)["usage"]["prompt_tokens"] == len("a\n ")  # a token is a byte


def test_a_terminal_without_a_language_takes_any_prompt(tiny: str) -> None:
    options = ("generate", "-m", tiny, "--max-new-tokens", "8", "--greedy", "-q", "-p", "Où")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with started(*options, environment=plain) as process:
        text, complaints = process.communicate(timeout=PATIENCE)

    assert (process.returncode, complaints) == (0, b"")
    assert text.isascii()


def shell(line: str, program: tuple[str, ...] = FIDDLER) -> tuple[int, bytes]:
    """What becomes of `fiddler` with its streams as a shell redirects them: its exit code, and its complaints."""
    command = f'"$@" {line}'
    done = subprocess.run(
        ["bash", "-c", command, "bash", *program], cwd=ROOT, capture_output=True, timeout=PATIENCE, check=False
    )
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done.returncode, done.stderr


COMMANDS = [
    "--version",
    "--help",
    "simulate --list",
    "simulate --json --new-tokens 2",
    "replay --json --tokens 4 --policy lru",
    "inspect --json -m $TINY",
    "generate -q -p a --max-new-tokens 2 -m $TINY",
    "generate -p a --json --max-new-tokens 2 -m $TINY",
    "chat -q --max-new-tokens 2 -m $TINY <<< Hello",
    "trace --json -p a --max-new-tokens 2 -o $TINY/routing.safetensors -m $TINY",
    "calibrate --json -m $TINY",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: line.partition(" -")[0] or line)
def test_an_output_that_cannot_be_written_is_one_line(
    command: str, tiny: str, forked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY", tiny)
    full = shell(f"{command} > /dev/full", forked if "TINY" in command else FIDDLER)
    assert full == (1, b"error: cannot write to standard output: No space left on device\n")
    if "TINY" not in command:
        closed = shell(f"{command} >&-")
        assert closed == (1, b"error: cannot write to standard output: Bad file descriptor\n")


@pytest.mark.parametrize("line", ["inspect 2>&- <&-", "generate -p a --max-new-tokens 2 2> /dev/full", "chat <&-"])
def test_notes_that_cannot_be_written_and_no_input_change_nothing(
    line: str, tiny: str, forked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY", tiny)
    assert shell(f"{line} -m $TINY", forked)[0] == 0


@pytest.mark.parametrize("command", [["generate", "-p", "a", "--max-new-tokens", LONG], ["chat"], ["inspect"]])
def test_ctrl_c_at_any_moment_leaves_without_a_word(tiny: str, command: list[str]) -> None:
    """From the program's first line on, which a Python of our own reports: before it, the interpreter answers."""
    code = (
        "import sys; from fiddler.cli import terminal; take = terminal.take_streams\n"
        "def begun(): sys.stderr.write('begun\\n'); sys.stderr.flush(); take()\n"
        "terminal.take_streams = begun; from fiddler.cli import app; app(prog_name='fiddler')"
    )
    for wait_s in (0.0, 0.03, 0.2, 0.8):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command, "-m", tiny],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process:
            assert pipe(process.stderr).readline() == b"begun\n"
            time.sleep(wait_s)
            for _ in range(2):  # twice quickly
                process.send_signal(signal.SIGINT)
            complaints = pipe(process.stderr).read()
        assert b"Traceback" not in complaints
        done = (0, 130) if command[0] != "generate" else (130,)  # a chat at its prompt, a table that is written
        assert process.returncode in done


def test_ctrl_c_ends_a_compiler_too(tiny: str, tmp_path: Path) -> None:
    script, pids = tmp_path / "cc", tmp_path / "pids"
    script.write_text(f"#!/bin/sh\nsleep 1000 &\necho $$ $! > {pids}.new; mv {pids}.new {pids}; wait\n")
    script.chmod(0o755)
    environment = {"CC": str(script), "XDG_CACHE_HOME": str(tmp_path)}
    with started("generate", "-p", "a", environment=environment) as process:
        while not pids.exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130
    for pid in pids.read_text().split():
        wait_until_gone(int(pid))


def test_ctrl_c_ends_a_completion_and_keeps_its_text(tiny: str) -> None:
    with started("generate", "-m", tiny, "-p", "a", "--max-new-tokens", LONG) as process:
        begun = pipe(process.stdout).read(1)
        process.send_signal(signal.SIGINT)
        rest, notes = process.communicate(timeout=PATIENCE)

    assert process.returncode == 130
    assert (begun + rest).endswith(b"\n")
    assert b"Traceback" not in notes
    assert b"1 prompt" in notes


def test_ctrl_c_ends_loading(tiny: str) -> None:
    with started("generate", "-m", tiny, "-p", "a", "--max-new-tokens", LONG) as process:
        assert pipe(process.stderr).readline().startswith(b"loading")
        process.send_signal(signal.SIGINT)
        text, notes = process.communicate(timeout=PATIENCE)

    assert process.returncode == 130
    assert (text, notes) == (b"", b"")


@pytest.mark.parametrize("command", [["generate", "-p", "a"], ["generate", "-p", "a", "--json"], ["inspect"]])
def test_a_reader_that_went_away_ends_it_silently(tiny: str, command: list[str], forked: tuple[str, ...]) -> None:
    length = ["--max-new-tokens", "20", "-q"] if command[0] == "generate" else ["--json"]
    with started(*command, "-m", tiny, *length, program=forked) as process:
        pipe(process.stdout).close()
        complaints = pipe(process.stderr).read()

    assert process.returncode == 141
    assert complaints in (b"", b"reading headers ...\n")


def test_ctrl_c_stops_an_answer_and_then_leaves_the_chat(tiny: str) -> None:
    keyboard, terminal = pty.openpty()
    with started("chat", "-m", tiny, "--max-new-tokens", LONG, stdin=terminal, stdout=terminal) as process:
        os.close(terminal)
        _read_prompt(keyboard)
        os.write(keyboard, b"Hello\n")
        _read(keyboard, len("Hello\r\n") + 4)
        process.send_signal(signal.SIGINT)
        while not (line := pipe(process.stderr).readline()).endswith(b"stopped\n"):
            assert line
        _read_prompt(keyboard)
        _interrupt_until_gone(process)
        complaints = pipe(process.stderr).read()
    os.close(keyboard)

    assert process.returncode == 0
    assert complaints == b"\n"


def _interrupt_until_gone(process: subprocess.Popen[bytes]) -> None:
    """Press ctrl-C as a person would: again, if nothing happens.

    Between showing a prompt and waiting for a key, CPython's `input()` notes a signal and acts on it only at the
    next one or the next key.
    """
    for _ in range(PATIENCE // 10):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
            return
    raise AssertionError("ctrl-C at the prompt does not leave the chat")


def _read(terminal: int, n_bytes: int) -> bytes:
    read = b""
    while len(read) < n_bytes:
        read += os.read(terminal, 1 << 16)
    return read


def _read_prompt(terminal: int) -> None:
    read = b""
    while not read.endswith(b"> "):
        read += os.read(terminal, 1 << 16)
