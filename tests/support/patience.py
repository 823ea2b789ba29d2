"""A limit for tests that wait without an event loop: nothing waits for ever."""

import faulthandler
from collections.abc import Generator
from contextlib import contextmanager

WAIT_S = 60
"""Longest wait for what must happen; nothing is concluded from how long it took."""


@contextmanager
def patience(seconds: float = WAIT_S) -> Generator[None]:
    """End the process, and say where each thread is, if the block takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
