"""The blocking queue of the engine's thread: any thread pushes, the engine waits. It needs no event loop."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import RLock
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """An unbounded queue: any thread pushes, one receives."""

    def __init__(self) -> None:
        self._items: SimpleQueue[T] = SimpleQueue()
        self._lock = RLock()  # garbage collected while it is held may push: an abandoned stream ends its request
        self._refuse: Callable[[T], None] | None = None

    def push(self, item: T) -> None:
        """Add an item and wake the receiver; never waits."""
        with self._lock:
            refuse = self._refuse
            if refuse is None:
                self._items.put(item)
        if refuse is not None:
            refuse(item)

    def seal(self, refuse: Callable[[T], None]) -> list[T]:
        """Take every item there is; from now on, pass each pushed item to `refuse` instead.

        `refuse` runs in the thread that pushes, so every late push is answered.
        """
        with self._lock:
            self._refuse = refuse
            return self.drain()

    def drain(self) -> list[T]:
        """Take every item there is."""
        items: list[T] = []
        while not self._items.empty():
            items.append(self._items.get_nowait())
        return items

    def receive(self) -> T:
        """Take the next item, waiting for it."""
        return self._items.get()

    def receive_within(self, seconds: float | None) -> list[T]:
        """Wait at most this long for the next item; returns it in a list, empty if none came."""
        try:
            return [self._items.get(timeout=seconds)]
        except Empty:
            return []
