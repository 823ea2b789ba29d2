"""How the program ends: errors as one line, ctrl-C, an output that cannot be written."""

import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any

from fiddler.cli.flags import spoken
from fiddler.cli.streams import OutputError, take_streams
from fiddler.errors import FiddlerError

FAILED = 1
INTERRUPTED = 130
"""As a shell reports a program that SIGINT ended."""


@contextmanager
def as_process() -> Generator[None]:
    """Run a whole process inside: ctrl-C ends it at once, and so does an output that cannot be written.

    Where work is done, ctrl-C is left alone: nothing takes long any more, and the exit code is the work's.
    """
    signal.signal(signal.SIGINT, leave_at_once)
    take_streams()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputError as error:
        if not error.silent:
            complain(error)
        sys.exit(error.code)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def guarded() -> Generator[None]:
    """Turn what goes wrong inside into an exit code and at most one line on stderr.

    Errors that are none of ours are bugs and keep their traceback. A ctrl-C that nothing inside handles ends the
    process at once: while a model is loaded there is nothing to keep, and a thread inside torch cannot be asked
    to stop.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes what it likes, whatever the terminal knows
    with on_sigint(leave_at_once):
        try:
            yield
            sys.stdout.flush()
        except FiddlerError as error:
            complain(error)
            sys.exit(FAILED)
        except KeyboardInterrupt:  # a second one, while the first was answered
            sys.exit(INTERRUPTED)


@contextmanager
def on_sigint(handler: Callable[..., Any]) -> Generator[None]:
    """Let `handler` take ctrl-C while the context lasts."""
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def leave_at_once(*_signal: object) -> None:
    """End the process without unwinding; a handler for SIGINT."""
    with suppress(Exception):  # the signal may have come in the middle of a write
        sys.stdout.flush()
    with suppress(Exception):
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # a spinner hides the cursor
    compiler = sys.modules.get("fiddler.devices.library")  # imported only by what may run one
    with suppress(Exception):
        if compiler is not None:
            compiler.end_all()
    os._exit(INTERRUPTED)


def complain(error: Exception) -> None:
    """Print an error as one line on stderr, in the words of a shell, whatever line breaks its message has."""
    print(f"error: {' '.join(spoken(str(error)).split())}", file=sys.stderr)
