"""Values into a thread that waits for them: none is lost, whoever comes too late is answered."""

from threading import Thread

from fiddler.lanes.queues import Mailbox
from tests.support.patience import patience


def test_drain_takes_everything_at_once() -> None:
    mailbox: Mailbox[int] = Mailbox()
    assert mailbox.drain() == []
    for item in range(3):
        mailbox.push(item)
    assert mailbox.receive() == 0
    assert mailbox.drain() == [1, 2]
    assert mailbox.drain() == []


def test_a_push_wakes_who_waits() -> None:
    mailbox: Mailbox[int] = Mailbox()
    received: list[int] = []
    with patience():
        waiting = Thread(target=lambda: received.extend(mailbox.receive() for _ in range(2)))
        waiting.start()
        mailbox.push(1)
        mailbox.push(2)
        waiting.join()
    assert received == [1, 2]


def test_a_wait_ends_with_its_time() -> None:
    mailbox: Mailbox[int] = Mailbox()
    with patience():
        assert mailbox.receive_within(0.01) == []
        mailbox.push(1)
        assert mailbox.receive_within(None) == [1]


def test_items_of_many_threads_come_in_the_order_of_each() -> None:
    mailbox: Mailbox[tuple[int, int]] = Mailbox()

    def push(thread: int) -> None:
        for item in range(500):
            mailbox.push((thread, item))

    threads = [Thread(target=push, args=(i,)) for i in range(4)]
    with patience():
        for thread in threads:
            thread.start()
        received = [mailbox.receive() for _ in range(2000)]
        for thread in threads:
            thread.join()
    for i in range(4):
        assert [item for thread, item in received if thread == i] == list(range(500))


def test_who_pushes_into_a_sealed_one_is_answered() -> None:
    mailbox: Mailbox[int] = Mailbox()
    refused: list[int] = []
    mailbox.push(1)
    assert mailbox.seal(refused.append) == [1]
    mailbox.push(2)
    assert (mailbox.drain(), refused) == ([], [2])
