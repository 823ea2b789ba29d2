"""What `gpu.cuda` takes for granted of CUDA and torch, each thing by itself."""

import time

import pytest
import torch

from fiddler.gpu.cuda import CudaGpu
from fiddler.gpu.device import Event
from fiddler.gpu.jobs import PinnedRing
from fiddler.models.seam import ExpertsCall, Forward

pytestmark = pytest.mark.nvidia
MIB = 1 << 20


@pytest.fixture
def gpu() -> CudaGpu:
    gpu = CudaGpu()
    gpu.enter()
    return gpu


def passed(event: Event) -> None:
    """Wait for an event as the lanes do: by asking."""
    deadline = time.monotonic() + 30
    while not event.done():
        assert time.monotonic() < deadline, "the GPU never got there"


def busy(gpu: CudaGpu, cycles: int = 200_000_000) -> None:
    """Keep the current stream busy for about a tenth of a second."""
    torch.cuda._sleep(cycles)


def test_nothing_waits_but_what_follows(gpu: CudaGpu) -> None:
    value = torch.zeros(1, device=gpu.device)
    gpu.link.run(lambda: (busy(gpu), value.fill_(1)))
    written = gpu.link.mark()
    seen_early = gpu.launch(lambda: value.clone())
    early = gpu.main.mark()
    passed(early)
    assert not written.done(), "the main stream waited for the link"
    gpu.main.follow(written)
    seen = gpu.launch(lambda: value.clone())
    after = gpu.main.mark()
    passed(after)
    assert (seen_early.item(), seen.item()) == (0.0, 1.0)
    assert after.since(early) > 0.01


def test_registered_memory_is_pinned_and_copies_from_it_let_the_host_go_on(gpu: CudaGpu) -> None:
    room = torch.empty(64 * MIB + 4096, dtype=torch.uint8)
    start = -room.data_ptr() % 4096
    memory = room[start : start + 64 * MIB - 100]  # whole pages are locked, whatever the size
    assert gpu.pin(memory)
    try:
        assert memory.is_pinned()
        assert memory[MIB : 2 * MIB].is_pinned()
        there = torch.empty_like(memory, device=gpu.device)
        gpu.link.run(lambda: busy(gpu))
        gpu.link.run(lambda: there.copy_(memory, non_blocking=True))
        landed = gpu.link.mark()
        assert not landed.done(), "the host waited for the copy"
        passed(landed)
        assert torch.equal(there.cpu(), memory)
    finally:
        gpu.unpin(memory)
    assert not memory.is_pinned()


def test_memory_that_cannot_be_pinned_leaves_no_error_behind(gpu: CudaGpu) -> None:
    memory = torch.empty(MIB, dtype=torch.uint8)
    assert gpu.pin(memory)
    assert not gpu.pin(memory), "it is registered already"
    assert torch.ones(3, device=gpu.device).sum().item() == 3.0
    gpu.unpin(memory)


def test_pageable_blocks_arrive_whole_through_the_ring(gpu: CudaGpu) -> None:
    block = torch.randint(0, 255, (33 * MIB + 77,), dtype=torch.uint8)
    there = torch.zeros(block.shape, dtype=torch.uint8, device=gpu.device)
    gpu.link.follow(gpu.main.mark())  # which has to write the zeros first
    PinnedRing(gpu, piece_bytes=2 * MIB).copy(block, there)
    passed(gpu.link.mark())
    assert torch.equal(there.cpu(), block)


def test_a_capture_runs_nothing_and_a_replay_reads_anew(gpu: CudaGpu) -> None:
    with torch.inference_mode():
        x, total = torch.ones(4, device=gpu.device), torch.zeros(4, device=gpu.device)
        weight = torch.eye(4, device=gpu.device)
        total.add_(x @ weight)  # so that cuBLAS is there
        graph, y = gpu.capture(gpu.pool(), lambda: total.add_(x @ weight) * 2)
        assert total.tolist() == [1.0] * 4
        x.fill_(3)
        graph.replay()
        passed(gpu.main.mark())
        assert (total.tolist(), y.tolist()) == ([4.0] * 4, [8.0] * 4)


def test_what_waits_cannot_be_captured_and_does_no_harm(gpu: CudaGpu) -> None:
    x = torch.ones(4, device=gpu.device)
    with pytest.raises(RuntimeError):
        gpu.capture(gpu.pool(), lambda: x.sum().item())
    gpu.reclaim()  # a capture that is void must not leave torch's allocator in it
    assert (x * 2).tolist() == [2.0] * 4


def test_pieces_between_greenlet_switches_can_be_captured(gpu: CudaGpu) -> None:
    x = torch.ones(2, 4, device=gpu.device)
    index, weights = torch.zeros(2, 1, dtype=torch.int64, device=gpu.device), torch.ones(2, 1, device=gpu.device)
    forward: Forward

    def run() -> torch.Tensor:
        return forward.suspend(ExpertsCall(0, x * 2, index, weights)) + 1

    with torch.inference_mode():
        forward = Forward(run)  # a first time without a capture: what is needed gets loaded
        forward.send(forward.send().hidden)
        pool, answer = gpu.pool(), torch.zeros(2, 4, device=gpu.device)
        forward = Forward(run)
        first, call = gpu.capture(pool, forward.send)
        second, result = gpu.capture(pool, lambda: forward.send(answer))
        assert forward.dead
        x.fill_(5)
        first.replay()
        answer.copy_(call.hidden)
        second.replay()
        passed(gpu.main.mark())
        assert result.tolist() == [[11.0] * 4] * 2


def test_peak_counts_what_is_held_at_most(gpu: CudaGpu) -> None:
    def work() -> None:
        torch.empty(8 * MIB, dtype=torch.uint8, device=gpu.device)
        torch.empty(4 * MIB, dtype=torch.uint8, device=gpu.device)

    assert 8 * MIB <= gpu.peak(work) < 12 * MIB
    memory = gpu.memory()
    assert 0 < memory.free <= memory.total
