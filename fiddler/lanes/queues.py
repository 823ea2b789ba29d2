"""Queues between the engine's thread and its callers' event loops; a push never waits.

`anyio.from_thread` waits until the consumer's loop has run the call, so a slow consumer would hold up the engine.
A push to a `Channel` appends an item and, if a task waits, asks its loop to wake it: asyncio's
`call_soon_threadsafe`, trio's `run_sync_soon`. `Latch` does the same for one event that any number of tasks may
wait for. `Mailbox` goes the other way, into the engine's thread, which needs no event loop.
"""

from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import RLock
from typing import Any, Generic, TypeVar

import anyio
from anyio import lowlevel

T = TypeVar("T")


class Channel(Generic[T]):
    """An unbounded queue: any thread pushes, one task at a time receives."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._lock = RLock()  # garbage collected while it is held may push: an abandoned stream ends its request
        self._wake: Callable[[], object] | None = None
        self._guard = anyio.ResourceGuard("receiving from this stream")

    def push(self, item: T) -> None:
        """Add an item and wake the receiver; never waits. A receiver whose loop is gone is not an error."""
        with self._lock:
            self._items.append(item)
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    async def receive(self) -> T:
        """Take the next item, waiting for it. Raises `anyio.BusyResourceError` for a second receiver."""
        with self._guard:
            await lowlevel.checkpoint()  # before an item is taken: a cancelled receive must lose none
            while True:
                event = anyio.Event()
                wake = waker(event)
                with self._lock:
                    self._wake = wake  # before looking: what is pushed from now on wakes
                    if self._items:
                        self._wake = None
                        return self._items.popleft()
                await event.wait()


def waker(event: anyio.Event) -> Callable[[], object]:
    """Return a function that sets an event of the calling task's loop, from any thread, while that loop runs."""
    token: Any = lowlevel.current_token().native_token
    soon = getattr(token, "run_sync_soon", None) or token.call_soon_threadsafe

    def wake() -> None:
        try:
            soon(event.set)
        except RuntimeError:  # the loop has ended, and with it the receiver (trio: RunFinishedError)
            return

    return wake


class Latch:
    """An event: set once, by any thread, and never reset."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._set = False
        self._wakers: list[Callable[[], object]] = []

    def set(self) -> None:
        """Wake all waiting tasks; a second call does nothing."""
        with self._lock:
            self._set = True
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    async def wait(self) -> None:
        """Return once it is set."""
        await lowlevel.checkpoint()
        event = anyio.Event()
        with self._lock:
            if self._set:
                return
            self._wakers.append(waker(event))
        await event.wait()


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
