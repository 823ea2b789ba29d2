"""A thread's own number of torch threads, without touching anybody else's.

torch keeps the number for each thread, and beside it the number that threads will take which have none yet.
`torch.set_num_threads` sets both. Here the second is put back, by a thread that lives no longer than that.
"""

from collections.abc import Callable
from threading import Lock, Thread
from typing import TypeVar

import torch

T = TypeVar("T")

_one = Lock()
"""Two that put the number back at once could each keep the other's."""


def set_own_threads(n: int) -> None:
    """Let torch use `n` threads for what the calling thread computes."""
    if torch.get_num_threads() == n:  # having asked, the thread takes no common number later on
        return
    with _one:
        others = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(n)
        _in_new_thread(lambda: torch.set_num_threads(others))


def _in_new_thread(ask: Callable[[], T]) -> T:
    """Return what a thread says that has set nothing yet."""
    said: list[T] = []
    thread = Thread(target=lambda: said.append(ask()), name="fiddler-threads", daemon=True)
    thread.start()
    thread.join()
    return said[0]
