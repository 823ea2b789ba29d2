"""The command line as a process: signals, pipes, exit codes, and what it imports."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

import fiddler
from tests.support.tiny import save_tiny

FIDDLER = (sys.executable, "-m", "fiddler")
ROOT = Path(__file__).parent.parent
LONG = "4000"
"""More tokens than are made before a signal arrives."""
PATIENCE = 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192))


def run(*args: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    with started(*args, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE) as process:
        stdout, stderr = process.communicate(stdin, timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@contextmanager
def started(
    *args: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*FIDDLER, *args], cwd=ROOT, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
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


def test_version() -> None:
    assert run("--version").stdout.decode().strip() == f"fiddler {fiddler.__version__}"


def test_a_piped_prompt_is_the_same_as_a_given_one(tiny: str) -> None:
    options = ("generate", "-m", tiny, "--max-new-tokens", "8", "--greedy", "-q")
    piped, given = run(*options, stdin="Où\nça".encode()), run(*options, "-p", "Où\nça")

    assert piped.returncode == given.returncode == 0
    assert piped.stdout == given.stdout != b"\n"
    assert piped.stderr == b""


@pytest.mark.parametrize(
    ("stdin", "message"), [(b"\xff\xfe", b"error: the prompt is not valid UTF-8"), (b"", b"empty")]
)
def test_a_piped_prompt_that_is_none_is_refused(tiny: str, stdin: bytes, message: bytes) -> None:
    result = run("generate", "-m", tiny, "-q", stdin=stdin)

    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count(b"\n") == 1


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
def test_a_reader_that_went_away_ends_it_silently(tiny: str, command: list[str]) -> None:
    length = ["--max-new-tokens", "20", "-q"] if command[0] == "generate" else ["--json"]
    with started(*command, "-m", tiny, *length) as process:
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
