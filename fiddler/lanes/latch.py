"""Something that happens once, in one thread, and that any number of tasks in any event loops wait for."""

from collections.abc import Callable
from threading import RLock

import anyio
from anyio import lowlevel

from fiddler.lanes.channel import waker


class Latch:
    """Set once, by any thread, and never taken back."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._set = False
        self._wakers: list[Callable[[], object]] = []

    def set(self) -> None:
        """Wake everybody who waits; nothing happens the second time."""
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
