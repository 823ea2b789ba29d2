"""Sets the number of torch threads of one thread, and of no other.

torch keeps a number for each thread, and a common one for threads without a number of their own.
`torch.set_num_threads` sets both. Here the common number is put back, by a short-lived thread.
"""

from collections.abc import Callable
from threading import Lock, Thread
from typing import TypeVar

import torch

T = TypeVar("T")

_one = Lock()
"""Two threads that put the common number back at once could each restore the number of the other."""


def set_own_threads(n: int) -> None:
    """Let torch use `n` threads for what the calling thread computes."""
    if torch.get_num_threads() == n:  # having asked, the thread takes no common number later on
        return
    with _one:
        others = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(n)
        _in_new_thread(lambda: torch.set_num_threads(others))


def _in_new_thread(ask: Callable[[], T]) -> T:
    """Return the result of `ask` in a new thread, which has no number of its own."""
    said: list[T] = []
    thread = Thread(target=lambda: said.append(ask()), name="fiddler-threads", daemon=True)
    thread.start()
    thread.join()
    return said[0]
