"""The fake keeps what a real GPU promises, and no more: order in a stream, events, replays into the same memory."""

import pytest
import torch

from tests.support.fake_gpu import FakeGpu


def test_a_stream_keeps_its_order_and_follows_others() -> None:
    gpu, seen = FakeGpu(), list[str]()
    gpu.link.run(lambda: seen.append("copied"))
    landed = gpu.link.mark()
    gpu.main.run(lambda: seen.append("before"))
    gpu.main.follow(landed)
    gpu.main.run(lambda: seen.append("used"))
    assert seen == []
    gpu.launch(lambda: seen.append("now"))
    assert [word for word in seen if word != "copied"] == ["before", "used", "now"]
    assert seen.index("copied") < seen.index("used")
    assert landed.done()


def test_an_event_is_done_in_the_end() -> None:
    gpu = FakeGpu(3)
    first, second = gpu.up.mark(), gpu.up.mark()
    while not second.done():
        pass
    assert second.since(first) > 0


def test_a_replay_reads_new_values_from_the_same_memory() -> None:
    gpu = FakeGpu()
    x, total = torch.ones(3), torch.zeros(3)

    def work() -> torch.Tensor:
        y = x * 2
        y.add_(1)
        total.add_(y)
        return y.view(3, 1)

    graph, y = gpu.capture(gpu.pool(), work)
    assert total.tolist() == [0, 0, 0]
    x.fill_(5)
    for _ in range(2):
        graph.replay()
    gpu.launch(lambda: None)
    assert (y[:, 0].tolist(), total.tolist()) == ([11, 11, 11], [22, 22, 22])


def test_a_capture_refuses_what_waits() -> None:
    gpu, x = FakeGpu(), torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted"):
        gpu.capture(gpu.pool(), lambda: x.sum().item())
