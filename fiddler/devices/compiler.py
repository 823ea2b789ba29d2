"""Runs a C compiler, which may be missing, fail, hang, or print anything. Nothing of it is left running."""

import atexit
import logging
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

from fiddler.devices.library import private_room

VERSION_S = 8.0
"""Seconds that a compiler has to answer `--version`."""
COMPILE_S = 20.0
"""The same for compiling, which takes one second on a machine that has nothing else to do."""
PATIENCE_S = 5.0
"""Seconds after which the log names the compiler that we wait for."""
MOST_BYTES = 1 << 16
"""Bytes of its output that are kept, the last ones."""
MOST_QUOTED = 200
"""Characters of a line of it that an error repeats."""

logger = logging.getLogger("fiddler")

_running: set[int] = set()
"""Process groups of compilers that were started and have not ended."""


def compiled(compiler: Sequence[str], source: Path, flags: Sequence[str]) -> bytes:
    """Return the library that a compiler makes of a source file. Raises as `run` does."""
    with private_room() as room:
        made = room / "made.so"
        run([*compiler, *flags, str(source), "-o", str(made), "-lm"], COMPILE_S, TMPDIR=str(room))
        if not made.is_file():  # reading a pipe would not end
            raise OSError("it made no library")
        return made.read_bytes()


def run(command: Sequence[str], limit_s: float, **environment: str) -> bytes:
    """Return what a compiler prints, in English. After `limit_s` seconds it is ended, with all that it started.

    Raises `OSError` where it cannot be started, `subprocess.SubprocessError` where it fails or takes too long.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, which can be ended whole
        env=os.environ | {"LC_ALL": "C"} | environment,
    )
    _running.add(process.pid)
    try:
        deadline = monotonic() + limit_s
        said = _read(process, deadline, f"{command[0]!r} has not ended; it is given {limit_s:g} s")
        code = process.wait(max(deadline - monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        raise subprocess.SubprocessError(f"it took more than {limit_s:g} s") from None
    finally:
        ended = process.poll() is not None
        _end(process.pid)  # one that has ended may have left others running
        if not ended:
            with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot be ended
                process.wait(1.0)
        _running.discard(process.pid)
        assert process.stdout is not None
        process.stdout.close()
    if code:
        lines = said.decode(errors="replace").strip().split("\n")
        told = next((line for line in lines if "error:" in line), lines[-1])  # what follows an error is of less use
        raise subprocess.SubprocessError(f"it ended with code {code}, and said {told[:MOST_QUOTED]!r}")
    return said


def _read(process: "subprocess.Popen[bytes]", deadline: float, waiting: str) -> bytes:
    """Return what a process prints, at most `MOST_BYTES`, until it closes its output or time is up.

    Not `communicate`, which waits for everybody who holds that output, even one that cannot be ended.
    """
    assert process.stdout is not None
    source, said, told = process.stdout.fileno(), b"", False
    poll = select.poll()
    poll.register(source, select.POLLIN)
    while (left_s := deadline - monotonic()) > 0:
        if poll.poll(1e3 * min(left_s, PATIENCE_S)):
            read = os.read(source, MOST_BYTES)
            if not read:
                break
            said = (said + read)[-MOST_BYTES:]
        elif not told:
            told = True
            logger.warning("waiting for the C compiler: %s", waiting)
    return said


def end_all() -> None:
    """End the compilers that run; for a process that is about to end."""
    for group in tuple(_running):
        _end(group)


def _end(group: int) -> None:
    with suppress(OSError):
        os.killpg(group, signal.SIGKILL)


atexit.register(end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)  # they are the parent's
