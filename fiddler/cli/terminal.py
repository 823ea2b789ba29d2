"""Ends the process well: errors as one line, ctrl-C, and standard streams that are closed or full."""

import io
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any

from fiddler.cli.flags import spoken
from fiddler.errors import FiddlerError

BROKEN_PIPE = 141
"""Exit code that a shell reports for a program that SIGPIPE ended."""


class OutputError(Exception):
    """Standard output cannot be written. Not an `OSError`, which others around a print may take for their own."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")
        self.silent = isinstance(error, BrokenPipeError)
        """Whether the reader went away, which is no mistake."""
        self.code = BROKEN_PIPE if self.silent else 1


class _Output(io.FileIO):
    """Standard output. After a failure it swallows everything, or the interpreter would complain as it ends."""

    failed = False

    def write(self, data: Any) -> int:
        if self.failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            raise OutputError(error) from error


class _Notes(io.FileIO):
    """Standard error; its failures never end the program."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def take_streams() -> None:
    """Replace this process's standard streams by ones that are there, and fail as said above.

    A closed descriptor gets a stand-in, or the next file that is opened would take its number and receive what is
    printed: one without input, one that cannot be written, one that takes everything.
    """
    for descriptor, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        if _closed(descriptor):
            opened = os.open(os.devnull, flags)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if os.environ.get("COLUMNS", "").strip("0") == "":
        os.environ.pop("COLUMNS", None)  # tables in a terminal of no width would be empty
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Notes(2, "w", closefd=False), sys.stderr)


def _closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def _text(raw: io.FileIO, like: Any) -> io.TextIOWrapper:
    """Return a text stream with the encoding and buffering of the one it replaces."""
    lines = raw.isatty() or isinstance(raw, _Notes)
    encoding, errors = getattr(like, "encoding", None) or "utf-8", getattr(like, "errors", None) or "replace"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=lines)


FAILED = 1
INTERRUPTED = 130
"""Exit code that a shell reports for a program that SIGINT ended."""


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
    """Turn errors inside into an exit code and at most one line on stderr.

    Errors outside of our tree are bugs and keep their traceback. A ctrl-C that nothing inside handles ends the
    process at once: while a model is loaded there is nothing to keep, and a thread inside torch cannot be stopped.
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
