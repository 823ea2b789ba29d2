"""The staging ring: every byte arrives whatever the GPU's pace, and the host is held up no more than it must be."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fiddler.gpu.device import Event
from fiddler.gpu.jobs import PIECE_BYTES, POLL_S, PinnedRing


@dataclass(eq=False)
class LateEvent:
    gpu: "LateGpu"
    passed: bool = False

    def done(self) -> bool:
        self.gpu.advance()
        return self.passed

    def since(self, earlier: Event) -> float:
        raise NotImplementedError


@dataclass(eq=False)
class LateGpu:
    """A GPU with a link alone, that does what is queued when `pace` says so and not before.

    `pace` has a number of queued things to do for each time the host asks anything of the GPU.
    """

    pace: Iterator[int] = field(default_factory=lambda: repeat(0))
    queue: deque[Any] = field(default_factory=deque)
    n_copied: int = 0

    @property
    def link(self) -> "LateGpu":
        return self

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, 77, dtype=dtype)

    def run(self, work: Callable[[], object]) -> None:
        self.queue.append(work)
        self.advance()

    def mark(self) -> LateEvent:
        event = LateEvent(self)
        self.queue.append(event)
        self.advance()
        return event

    def follow(self, event: Event) -> None:
        raise NotImplementedError

    def advance(self) -> None:
        self.work(next(self.pace))

    def work(self, n: int) -> None:
        for _ in range(min(n, len(self.queue))):
            head = self.queue.popleft()
            if isinstance(head, LateEvent):
                head.passed = True
            else:
                self.n_copied += 1
                head()

    def sleep(self, seconds: float) -> None:
        """Time passes only while the host sleeps, and then enough for something to happen."""
        assert seconds == POLL_S
        self.work(1)

    def finish(self) -> None:
        self.work(len(self.queue))


def ring(gpu: Any, n_pieces: int = 4, piece_bytes: int = 8, sleep: Any = None) -> PinnedRing:
    return PinnedRing(gpu, n_pieces=n_pieces, piece_bytes=piece_bytes, sleep=sleep or gpu.sleep)


def block_of(n_bytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator)


class TestCopy:
    @given(
        sizes=st.lists(st.integers(0, 90), min_size=1, max_size=4),
        n_pieces=st.integers(1, 5),
        piece_bytes=st.integers(1, 17),
        pace=st.lists(st.integers(0, 4), max_size=60),
        then=st.integers(0, 1),
    )
    def test_no_piece_is_overwritten_before_it_is_copied(
        self, sizes: list[int], n_pieces: int, piece_bytes: int, pace: list[int], then: int
    ) -> None:
        gpu = LateGpu(chain(pace, repeat(then)))
        staging = ring(gpu, n_pieces, piece_bytes)
        blocks = [block_of(n, seed) for seed, n in enumerate(sizes)]
        slots = [torch.zeros_like(block) for block in blocks]
        for block, slot in zip(blocks, slots, strict=True):
            staging.copy(block.clone(), slot)
        gpu.finish()
        for block, slot in zip(blocks, slots, strict=True):
            assert torch.equal(slot, block)

    @pytest.mark.parametrize("off", [-1, 0, 1, 64])
    def test_odd_sizes_arrive_whole_and_nothing_beside_them_is_written(self, off: int) -> None:
        gpu = LateGpu()
        block = block_of(3 * PIECE_BYTES + off)
        arena = torch.zeros(len(block) + 64, dtype=torch.uint8)
        PinnedRing(gpu, sleep=gpu.sleep).copy(block, arena[32:-32])  # type: ignore[arg-type]
        gpu.finish()
        assert torch.equal(arena[32:-32], block)
        assert not arena[:32].any()
        assert not arena[-32:].any()

    def test_the_block_may_change_once_it_has_returned(self) -> None:
        gpu = LateGpu()
        block = block_of(30)
        before, slot = block.clone(), torch.zeros_like(block)
        ring(gpu).copy(block, slot)
        block.zero_()
        gpu.finish()
        assert torch.equal(slot, before)

    def test_the_host_fills_a_piece_while_others_are_copied(self) -> None:
        """It sleeps first when every piece waits for the GPU, and goes on as soon as one has been copied."""
        gpu = LateGpu()
        asleep: list[tuple[int, int]] = []

        def sleep(seconds: float) -> None:
            asleep.append((len(gpu.queue), gpu.n_copied))
            gpu.work(1)

        n_pieces = 3
        ring(gpu, n_pieces, 8, sleep).copy(block_of(5 * 8), torch.zeros(5 * 8, dtype=torch.uint8))
        # Queued are a copy and an event for each piece; a sleep sees one of them done.
        full = 2 * n_pieces
        assert asleep == [(full, 0), (full - 1, 1), (full, 1), (full - 1, 2)]

    def test_a_free_ring_never_waits(self) -> None:
        gpu = LateGpu(repeat(2))
        ring(gpu, sleep=lambda _: pytest.fail("slept")).copy(block_of(100), torch.zeros(100, dtype=torch.uint8))

    def test_any_thread_may_write_the_pieces(self) -> None:
        """One that is in inference mode may make a ring for one that is not."""
        gpu = LateGpu()
        with torch.inference_mode():
            staging = ring(gpu)
        block, slot = block_of(20), torch.zeros(20, dtype=torch.uint8)
        staging.copy(block, slot)
        gpu.finish()
        assert torch.equal(slot, block)


class TestErrors:
    @pytest.mark.parametrize("n_bytes", [9, 11])
    def test_another_size_is_refused_unqueued(self, n_bytes: int) -> None:
        gpu = LateGpu()
        with pytest.raises(ValueError, match="does not fit"):
            ring(gpu).copy(block_of(10), torch.zeros(n_bytes, dtype=torch.uint8))
        assert not gpu.queue

    def test_no_pinned_memory_is_the_callers_error(self) -> None:
        class Poor(LateGpu):
            def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
                raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            ring(Poor())

    @given(fails_at=st.integers(0, 4), launched=st.booleans(), pace=st.lists(st.integers(0, 2), max_size=30))
    def test_a_failed_launch_reaches_the_caller_and_the_ring_stays_sound(
        self, fails_at: int, launched: bool, pace: list[int]
    ) -> None:
        """Also if the launch that failed was made: its piece is still read."""

        class Failing(LateGpu):
            left = fails_at

            def run(self, work: Callable[[], object]) -> None:
                self.left -= 1
                if self.left != -1:
                    return super().run(work)
                if launched:
                    super().run(work)
                raise RuntimeError("launch failed")

        gpu = Failing(chain(pace, repeat(0)))
        staging = ring(gpu, n_pieces=2)
        first, second = block_of(5 * 8, 1), block_of(5 * 8, 2)
        slots = torch.zeros(5 * 8, dtype=torch.uint8), torch.zeros(5 * 8, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="launch failed"):
            staging.copy(first, slots[0])
        staging.copy(second, slots[1])
        gpu.finish()
        sent = 8 * (fails_at + launched)
        assert torch.equal(slots[0][:sent], first[:sent])
        assert not slots[0][sent:].any()
        assert torch.equal(slots[1], second)

    def test_an_event_that_fails_reaches_the_caller(self) -> None:
        def broken() -> Iterator[int]:
            yield from repeat(0, 2)  # one piece: run and mark
            raise RuntimeError("the GPU has fallen off the bus")

        with pytest.raises(RuntimeError, match="fallen"):
            ring(LateGpu(broken()), n_pieces=1).copy(block_of(16), torch.zeros(16, dtype=torch.uint8))
