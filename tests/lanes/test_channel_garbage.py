"""Garbage is collected anywhere, also while items are taken: what it pushes neither waits nor is lost."""

import gc
from collections.abc import Iterator
from threading import Thread
from weakref import finalize

import anyio
import pytest

from fiddler.lanes.queues import Channel, Mailbox

N = 3000
WAIT_S = 20
"""Longest wait for what must happen; nothing is concluded from how long it took."""


class Abandoned:
    """Garbage that only a collection frees, and that pushes when it is."""

    def __init__(self, channel: Channel[int] | Mailbox[int], item: int) -> None:
        self.itself = self
        finalize(self, channel.push, item)


@pytest.fixture
def collecting() -> Iterator[None]:
    """Collect at nearly every allocation."""
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(3)
    yield
    gc.set_threshold(*before)


def drained() -> list[int]:
    mailbox: Mailbox[int] = Mailbox()
    items: list[int] = []
    for item in range(N):
        Abandoned(mailbox, item)
        items += mailbox.drain()
    gc.collect()
    return items + mailbox.drain()


async def received() -> list[int]:
    channel: Channel[int] = Channel()
    items: list[int] = []
    for item in range(N // 3):
        Abandoned(channel, item)
        with anyio.move_on_after(0):
            items.append(await channel.receive())
    gc.collect()
    return [*items, *channel._items]


@pytest.mark.usefixtures("collecting")
@pytest.mark.parametrize("how", ["drained", "received"])
def test_garbage_may_push_while_the_channel_is_read(how: str) -> None:
    found: list[int] = []
    reading = (lambda: found.extend(drained())) if how == "drained" else (lambda: found.extend(anyio.run(received)))
    thread = Thread(
        target=reading, daemon=True
    )  # in a thread, for a lock that is held for ever holds this one only
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "a push waits for the read it interrupted"
    assert sorted(found) == list(range(N if how == "drained" else N // 3))
