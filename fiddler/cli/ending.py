"""How a command ends: errors as one line, ctrl-C, a reader that went away."""

import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any

import typer

from fiddler.errors import FiddlerError

FAILED = 1
INTERRUPTED = 130
BROKEN_PIPE = 141
"""As a shell reports a program that SIGINT or SIGPIPE ended."""


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
            raise typer.Exit(FAILED) from error
        except BrokenPipeError as error:
            _silence(sys.stdout)
            raise typer.Exit(BROKEN_PIPE) from error


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
    os._exit(INTERRUPTED)


def complain(error: Exception) -> None:
    """Print an error as one line on stderr, whatever line breaks its message has."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def _silence(stream: Any) -> None:
    """Send what is left in a stream's buffer nowhere, or the interpreter complains of it as it ends."""
    with suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
