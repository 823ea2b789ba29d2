"""The three standard streams of a process, which may be closed, full, or read by nobody."""

import io
import os
import sys
from typing import Any

BROKEN_PIPE = 141
"""As a shell reports a program that SIGPIPE ended."""


class OutputError(Exception):
    """Standard output cannot be written. Not an `OSError`, which others around a print may take for their own."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")
        self.silent = isinstance(error, BrokenPipeError)
        """Whether the reader went away, which is no mistake."""
        self.code = BROKEN_PIPE if self.silent else 1


class _Output(io.FileIO):
    """Standard output. Having failed once it takes everything, or the interpreter would complain as it ends."""

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
    """Standard error: no reason to end, whatever becomes of it."""

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
    """Return a text stream that encodes as the one in its place does, and passes on as often."""
    lines = raw.isatty() or isinstance(raw, _Notes)
    encoding, errors = getattr(like, "encoding", None) or "utf-8", getattr(like, "errors", None) or "replace"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=lines)
