"""What fails on a GPU falls back to the CPU, what fails there fails its own requests, and the engine goes on."""

from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from threading import current_thread
from typing import Any
from unittest.mock import patch

import anyio
import pytest
import torch
from torch import Tensor

from fiddler import ConfigError, Engine, EngineConfig, EngineFailedError
from fiddler.cost.model import no_costs
from fiddler.devices.cpu import CpuDevice
from fiddler.engine import gpu_assembly
from fiddler.gpu import cuda, jobs
from fiddler.gpu.jobs import GpuJobs
from tests.support import conformance
from tests.support.conformance import PROMPTS, greedy
from tests.support.fake_gpu import FakeGpu
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.anyio

BROKEN = RuntimeError("broken")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3_moe")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return conformance.reference(model)


@pytest.fixture
def anyio_backend() -> str:
    """The caller's loop makes no difference to what fails behind it."""
    return "trio"


@pytest.fixture(params=[0.0, float("inf")], ids=["pageable", "pinned"], autouse=True)
def gpu(request: pytest.FixtureRequest) -> Generator[FakeGpu]:
    gpu = FakeGpu(4, pinnable=request.param)
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(cuda, "open_gpu", lambda: gpu),
        patch.object(gpu_assembly, "_costs", lambda loaded, *_: no_costs(len(loaded.n_experts))),
    ):
        yield gpu


@asynccontextmanager
async def opened(model: Path, **options: Any) -> AsyncIterator[Engine]:
    """An engine that leaves nothing behind, whatever happened to it."""
    config = {"device": "cuda", "kernels": "linear", "slots": 5, "kv_tokens": 256, "planner": "all-fetch"}
    with anyio.fail_after(60):
        async with Engine(model, EngineConfig(**(config | options))) as engine:
            loop = engine._loop
            yield engine
            await conformance.settled(engine)
        assert loop is not None
        assert loop._rig.scheduler.idle
        loop._rig.scheduler.check()


async def test_copies_that_fail_go_to_the_cpu(model: Path, expected: list[list[int]]) -> None:
    copy = GpuJobs.copy

    def failing(self: GpuJobs, job: Any) -> Any:
        if job.expert % 2:
            raise BROKEN
        return copy(self, job)

    async with opened(model) as engine:
        with patch.object(GpuJobs, "copy", failing):
            assert await conformance.together(engine) == expected
        now = engine.statistics()
        assert now.n_fallbacks > 0
        assert now.cpu.n_loads > 0 < now.gpu.n_loads
        assert await conformance.together(engine) == expected


async def test_experts_that_the_gpu_cannot_be_given_go_to_the_cpu(model: Path, expected: list[list[int]]) -> None:
    async with opened(model, graphs=False) as engine:
        with patch.object(jobs._Grouped, "of", side_effect=BROKEN):
            assert await conformance.together(engine) == expected
        assert engine.statistics().n_fallbacks > 0
        assert engine.statistics().dead_lanes == ()
        assert await conformance.together(engine) == expected


async def test_results_that_find_no_room_on_the_gpu_fail_and_nobody_waits(
    model: Path, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(model, planner="all-cpu") as engine:
        with patch.object(GpuJobs, "land", side_effect=torch.OutOfMemoryError("no more")):
            found = await tokens_or_error(engine, PROMPTS[0])
        assert isinstance(found, EngineFailedError)
        assert isinstance(found.__cause__, torch.OutOfMemoryError)
        assert await conformance.together(engine) == expected
        assert engine.statistics().n_slots < 5, "slots were given up for it"
    assert sum("experts on the GPU failed" in record.message for record in caplog.records) == 1


async def test_where_no_more_memory_can_be_pinned_results_come_from_what_can_be_had(
    model: Path, expected: list[list[int]], gpu: FakeGpu
) -> None:
    pinned = gpu.pinned

    def refusing(*shape: int, dtype: torch.dtype) -> Tensor:
        if current_thread().name == "fiddler-cpu":
            raise RuntimeError("CUDA error: out of memory")
        return pinned(*shape, dtype=dtype)

    with patch.object(gpu, "pinned", refusing):
        async with opened(model, planner="all-cpu") as engine:
            assert await conformance.together(engine) == expected
            assert engine.statistics().dead_lanes == ()


async def test_what_cannot_be_opened_leaves_nothing_locked(model: Path, gpu: FakeGpu) -> None:
    before = gpu._pinnable
    with patch.object(gpu_assembly, "_costs", side_effect=BROKEN), pytest.raises(RuntimeError, match="broken"):
        async with opened(model):
            pass
    with pytest.raises(ConfigError, match="warm_start"):
        async with opened(model, warm_start=model / "config.json"):
            pass
    assert gpu._pinnable == before


async def tokens_or_error(engine: Engine, prompt: Sequence[int]) -> list[int] | EngineFailedError:
    try:
        return list((await engine.generate(list(prompt), greedy())).token_ids)
    except EngineFailedError as error:
        return error


async def test_what_fails_on_the_cpu_fails_its_requests_alone(model: Path, expected: list[list[int]]) -> None:
    run = CpuDevice.run

    def failing(self: CpuDevice, layer: int, loads: Any, *others: Any) -> None:
        if any(load.expert == 3 for load in loads):
            raise BROKEN
        run(self, layer, loads, *others)

    async with opened(model, slots=0) as engine:
        with patch.object(CpuDevice, "run", failing):
            found = [await tokens_or_error(engine, prompt) for prompt in PROMPTS]
        failed = [one for one in found if isinstance(one, EngineFailedError)]
        assert [one.__cause__ for one in failed] == [BROKEN] * len(failed)
        assert all(one in (*failed, tokens) for one, tokens in zip(found, expected, strict=True))
        assert engine.statistics().n_failed == len(failed) > 0
        assert await conformance.together(engine) == expected


async def test_a_worker_that_dies_is_done_without(model: Path) -> None:
    async with opened(model, planner="all-cpu") as engine:
        with patch.object(GpuJobs, "compute", side_effect=BROKEN):
            assert isinstance(await tokens_or_error(engine, PROMPTS[0]), EngineFailedError)
        assert engine.statistics().dead_lanes == ("cpu",)
        await tokens_or_error(engine, PROMPTS[1])  # what can be fetched is, and nobody waits for ever


async def test_a_forward_that_raises_ends_its_step_alone(model: Path, expected: list[list[int]]) -> None:
    async with opened(model, graphs=False) as engine:
        assert engine._loaded is not None
        attention = engine._loaded.model.get_submodule("model.layers.1.self_attn")
        hook = attention.register_forward_hook(lambda *_: (_ for _ in ()).throw(BROKEN))
        with pytest.raises(EngineFailedError):
            await engine.generate(list(PROMPTS[0]), greedy())
        hook.remove()
        assert await conformance.together(engine) == expected


async def test_memory_is_given_back_when_an_engine_closes(model: Path, gpu: FakeGpu) -> None:
    pinned_before = gpu._pinnable
    async with opened(model) as engine:
        await conformance.together(engine)
        loop = engine._loop
    assert loop is not None
    assert gpu._pinnable == pinned_before
    assert loop._rig.steps.arena is not None
    assert loop._rig.steps.arena.nbytes == 0
    side: Any = loop._rig.side
    assert side.work.copying.arena.n_slots == 0
