"""Values from any thread into an event loop: in order, none lost, nobody waiting for the other."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import lowlevel
from anyio.abc import TaskStatus

from fiddler.lanes.queues import Channel

pytestmark = pytest.mark.anyio
WAIT_S = 20
"""Longest wait for what must happen; nothing is concluded from how long it took."""


def in_thread(work: Callable[[], object]) -> None:
    """Run `work` in another thread, to its end, without the event loop noticing."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # re-raised where it is seen
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


async def test_items_come_in_the_order_they_were_pushed() -> None:
    channel: Channel[int] = Channel()
    for item in range(100):
        channel.push(item)
    assert [await channel.receive() for _ in range(100)] == list(range(100))


async def test_items_that_are_false_come_too() -> None:
    channel: Channel[object] = Channel()
    for item in (None, 0, "", False):
        channel.push(item)
    assert [await channel.receive() for _ in range(4)] == [None, 0, "", False]


async def test_a_push_from_another_thread_wakes_a_waiting_receiver() -> None:
    channel: Channel[str] = Channel()
    received: list[str] = []

    async def receive() -> None:
        received.append(await channel.receive())

    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await until_waiting(channel)
            assert received == []
            in_thread(lambda: channel.push("hello"))
    assert received == ["hello"]


async def until_waiting(channel: Channel[Any]) -> None:
    """Let others run until a receiver has left its waker behind."""
    while channel._wake is None:
        await lowlevel.checkpoint()


async def test_a_push_from_the_same_loop_wakes_too() -> None:
    channel: Channel[str] = Channel()
    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks:

            async def push_when_awaited() -> None:
                await until_waiting(channel)
                channel.push("hello")

            tasks.start_soon(push_when_awaited)
            assert await channel.receive() == "hello"


async def test_threads_that_push_at_once_lose_nothing() -> None:
    channel: Channel[tuple[int, int]] = Channel()
    n_threads, n_items = 4, 250
    start = threading.Barrier(n_threads)

    def push(thread: int) -> None:
        start.wait()
        for item in range(n_items):
            channel.push((thread, item))

    threads = [threading.Thread(target=push, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    with anyio.fail_after(WAIT_S):
        received = [await channel.receive() for _ in range(n_threads * n_items)]
    for thread in threads:
        thread.join()
    for i in range(n_threads):
        assert [item for thread, item in received if thread == i] == list(range(n_items))
    assert [*channel._items] == []


async def test_a_push_does_not_wait_for_the_receiver() -> None:
    channel: Channel[int] = Channel()
    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive_into, channel, received := [])
            await until_waiting(channel)
            # The loop stands still here, and yet all pushes return.
            in_thread(lambda: [channel.push(item) for item in range(1000)])
            assert received == []
    assert received == [0]
    assert [*channel._items] == list(range(1, 1000))


async def receive_into(channel: Channel[int], received: list[int]) -> None:
    received.append(await channel.receive())


async def test_a_cancelled_receive_loses_nothing() -> None:
    channel: Channel[int] = Channel()
    with anyio.move_on_after(0) as scope:
        await channel.receive()
    assert scope.cancelled_caught
    channel.push(1)
    channel.push(2)
    with anyio.fail_after(WAIT_S):
        assert [await channel.receive(), await channel.receive()] == [1, 2]


async def test_a_cancelled_receive_leaves_what_is_there() -> None:
    channel: Channel[int] = Channel()
    channel.push(1)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await channel.receive()
    assert scope.cancelled_caught
    assert [*channel._items] == [1]


async def test_a_push_that_meets_a_cancelled_receive_is_kept() -> None:
    channel: Channel[str] = Channel()

    async def receive(*, task_status: TaskStatus[anyio.CancelScope]) -> None:
        with anyio.CancelScope() as scope:
            task_status.started(scope)
            await channel.receive()
            raise AssertionError("it was cancelled before it could run")

    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks:
            scope = await tasks.start(receive)
            await until_waiting(channel)
            scope.cancel()
            channel.push("kept")
        assert await channel.receive() == "kept"


async def test_a_second_receiver_is_refused_and_the_first_goes_on() -> None:
    channel: Channel[str] = Channel()
    received: list[str] = []

    async def receive() -> None:
        received.append(await channel.receive())

    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await until_waiting(channel)
            with pytest.raises(anyio.BusyResourceError):
                await channel.receive()
            channel.push("for the first")
    assert received == ["for the first"]


async def test_receivers_may_follow_each_other() -> None:
    channel: Channel[int] = Channel()
    received: list[int] = []
    with anyio.fail_after(WAIT_S):
        for item in range(3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive_into, channel, received)
                channel.push(item)
    assert received == [0, 1, 2]


async def test_receiving_lets_others_run_though_items_are_there() -> None:
    channel: Channel[int] = Channel()
    n_turns = 0

    async def count() -> None:
        nonlocal n_turns
        while True:
            await lowlevel.checkpoint()
            n_turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        for item in range(50):
            channel.push(item)
            await channel.receive()
        tasks.cancel_scope.cancel()
    assert n_turns >= 10


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_push_after_the_receivers_loop_has_ended_is_kept(backend: str) -> None:
    channel: Channel[str] = Channel()
    wakers: queue.Queue[Callable[[], object]] = queue.Queue()

    async def wait_in_vain() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.receive)
            await until_waiting(channel)
            assert channel._wake is not None
            wakers.put(channel._wake)
            tasks.cancel_scope.cancel()

    anyio.run(wait_in_vain, backend=backend)
    channel.push("nobody waits")
    wakers.get_nowait()()
    in_thread(lambda: channel.push("nobody at all"))
    assert [*channel._items] == ["nobody waits", "nobody at all"]


@pytest.mark.parametrize(("first", "second"), [("asyncio", "trio"), ("trio", "asyncio")])
def test_a_channel_may_move_to_another_loop(first: str, second: str) -> None:
    channel: Channel[int] = Channel()

    async def give_up() -> None:
        with anyio.move_on_after(0):
            await channel.receive()

    anyio.run(give_up, backend=first)
    channel.push(7)
    assert anyio.run(channel.receive, backend=second) == 7
