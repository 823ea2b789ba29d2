"""Engines on which copies, experts, lanes and callers fail: those concerned end with a typed error, nobody else."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest
from anyio import lowlevel
from torch import Tensor

from fiddler import Engine, EngineClosedError, EngineConfig, EngineFailedError, GenerationConfig
from fiddler.cost.model import LaneName
from fiddler.devices.arena import SimDevice
from fiddler.devices.cpu import CpuDevice
from fiddler.lanes.experts import ExpertWork
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import CopyExpert, Event, Failures, Job, JobDone, LayerDone, RunExperts
from fiddler.scheduler.routing import Load
from fiddler.steps.stream import TokenStream
from fiddler.steps.wave import ModelWave
from fiddler.types import ExpertWeights
from tests.support.covering import covering
from tests.support.tiny import N_EXPERTS, N_LAYERS, save_tiny

pytestmark = pytest.mark.anyio

WAIT_S = 60
"""Longest wait for what must happen; nothing is concluded from how long it took."""
PROMPTS = ("Once upon a time", "Hello, hello", "The", "A rather longer prompt, so that there is something to cut")
BROKEN = RuntimeError("broken")
N_TOKENS = 6
FOREVER = 400
WALL, VIRTUAL = "sim", "sim:rtx4090-desktop"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def anyio_backend() -> str:
    """The caller's loop makes no difference to what fails behind it."""
    return "asyncio"


@pytest.fixture(params=[WALL, VIRTUAL])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def greedy(n: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1)


@asynccontextmanager
async def opened(model: Path, **options: Any) -> AsyncIterator[Engine]:
    """An engine that leaves nothing behind, whatever happened to it."""
    config = {"kernels": "linear", "slots": 4, "planner": "all-fetch", "chunk_tokens": 16, **options}
    with anyio.fail_after(WAIT_S):
        async with Engine(model, EngineConfig(**config)) as engine:
            loop = engine._loop
            yield engine
        assert loop is not None
        rig = loop._rig
        assert not rig.runner._running
        assert rig.scheduler.idle
        rig.scheduler.check()
        cache = rig.scheduler.cache
        assert cache.n_free + cache.n_ready == cache.n_slots
        assert not cache._slots.leases
        assert not loop._running
        assert loop.statistics.kv_bytes == 0


Outcome = tuple[int, ...] | Exception
Key = tuple[int, int]


async def outcome(engine: Engine, prompt: str) -> Outcome:
    """Return a request's tokens, or what it ended with."""
    try:
        return (await engine.generate(prompt, greedy(N_TOKENS))).token_ids
    except EngineFailedError as error:
        return error


async def outcomes(engine: Engine, prompts: Sequence[str] = PROMPTS) -> list[Outcome]:
    """Run requests side by side."""
    found: dict[int, Outcome] = {}

    async def one(i: int) -> None:
        found[i] = await outcome(engine, prompts[i])

    async with anyio.create_task_group() as group:
        for i in range(len(prompts)):
            group.start_soon(one, i)
    return [found[i] for i in range(len(prompts))]


async def undisturbed(model: Path, **options: Any) -> list[Outcome]:
    async with opened(model, device="cpu", **options) as engine:
        return await outcomes(engine)


def break_copies(patch: pytest.MonkeyPatch, fails: Callable[[int, int], bool]) -> None:
    copy = SimDevice.copy

    def broken(self: SimDevice, layer: int, expert: int, slot: int) -> None:
        if fails(layer, expert):
            raise BROKEN
        copy(self, layer, expert, slot)

    patch.setattr(SimDevice, "copy", broken)


def break_experts(patch: pytest.MonkeyPatch, fails: Callable[[int, int, bool], bool]) -> None:
    """Let experts fail by (layer, expert, whether their weights lie in a slot)."""
    run = CpuDevice.run

    def broken(
        self: CpuDevice,
        layer: int,
        loads: Sequence[Load],
        weights: Sequence[ExpertWeights],
        rows: Tensor,
        out: Tensor,
    ) -> None:
        for load, own in zip(loads, weights, strict=True):
            in_slot = self.weights(layer, load.expert).down.data_ptr() != own.down.data_ptr()
            if fails(layer, load.expert, in_slot):
                raise BROKEN
        run(self, layer, loads, weights, rows, out)

    patch.setattr(CpuDevice, "run", broken)


def break_lane(patch: pytest.MonkeyPatch, lane: LaneName, after: int) -> None:
    """Let a lane die of its next job after some."""
    execute, seen = ExpertWork.__call__, [0]

    def dying(self: ExpertWork, job: Job) -> Failures:
        if job.lane == lane and isinstance(job, RunExperts | CopyExpert):
            seen[0] += 1
            if seen[0] > after:
                raise BROKEN
        return execute(self, job)

    patch.setattr(ExpertWork, "__call__", dying)


# What falls back


@pytest.mark.parametrize("share", [1.0, 0.3])
async def test_failing_copies_change_no_token(
    tiny: Path, device: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(tiny)
    async with opened(tiny, device=device) as engine:
        rng = Random(1)
        with monkeypatch.context() as patch:
            break_copies(patch, lambda layer, expert: rng.random() < share)
            assert await outcomes(engine) == expected
        now = engine.statistics()
        assert now.n_failed == 0
        assert now.n_fallbacks > 0 or device == WALL
        assert await outcomes(engine) == expected
    assert engine.statistics().n_slots_used > 0


@pytest.mark.parametrize("share", [1.0, 0.3])
async def test_experts_that_fail_in_their_slots_change_no_token(
    tiny: Path, device: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(tiny)
    async with opened(tiny, device=device) as engine:
        rng = Random(1)
        with monkeypatch.context() as patch:
            break_experts(patch, lambda layer, expert, in_slot: in_slot and rng.random() < share)
            assert await outcomes(engine) == expected
        now = engine.statistics()
        assert now.n_failed == 0
        assert now.n_fallbacks > 0
        assert await outcomes(engine) == expected


@pytest.mark.parametrize(
    ("device", "lane", "after"), covering([WALL, VIRTUAL], ["gpu", "link"], [0, 5]), indirect=["device"]
)
async def test_a_dead_gpu_or_link_changes_no_token(
    tiny: Path, device: str, lane: LaneName, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(tiny)
    with monkeypatch.context() as patch:
        break_lane(patch, lane, after)
        async with opened(tiny, device=device) as engine:
            assert await outcomes(engine) == expected
            assert await outcomes(engine) == expected
            assert engine.statistics().n_failed == 0
            assert engine._loop is not None
            assert engine._loop._rig.scheduler._jobs.dead.keys() == {lane}


async def test_without_any_free_slot_everything_runs_on_the_cpu(tiny: Path, device: str) -> None:
    expected = await undisturbed(tiny)
    for slots in (0, 1):
        async with opened(tiny, device=device, slots=slots) as engine:
            assert await outcomes(engine) == expected


# What fails for good


async def visits(model: Path) -> dict[str, set[Key]]:
    """Return the experts that each prompt and its completion visit, run alone."""
    visited: dict[str, set[Key]] = {prompt: set() for prompt in PROMPTS}
    current = [PROMPTS[0]]
    advance = ModelWave.advance

    def noting(self: ModelWave) -> Layer | None:
        layer = advance(self)
        if layer is not None:
            visited[current[0]].update((layer.index, load.expert) for load in layer.work.loads)
        return layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelWave, "advance", noting)
        async with opened(model, device="cpu") as engine:
            for prompt in PROMPTS:
                current[0] = prompt
                await engine.generate(prompt, greedy(N_TOKENS))
    return visited


def has_failed(got: Outcome) -> bool:
    """Whether a request ended with a typed error that names its cause."""
    return isinstance(got, EngineFailedError) and got.__cause__ is BROKEN and "RuntimeError: broken" in str(got)


@pytest.mark.parametrize("device", ["cpu", WALL, VIRTUAL])
@pytest.mark.parametrize("waves", ["one", "two"])
async def test_an_expert_that_fails_everywhere_ends_the_requests_that_visit_it_alone(
    tiny: Path, device: str, waves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, visited = await undisturbed(tiny), await visits(tiny)
    keys = [(layer, expert) for layer in range(N_LAYERS) for expert in range(N_EXPERTS)]
    concerned = {key: [key in visited[prompt] for prompt in PROMPTS] for key in keys}
    some = [key for key in keys if 0 < sum(concerned[key]) < len(PROMPTS)][::3]
    assert len(some) > 2
    async with opened(tiny, device=device, waves=waves) as engine:
        for at in some:
            with monkeypatch.context() as patch:
                break_experts(patch, lambda layer, expert, in_slot, at=at: (layer, expert) == at)  # type: ignore[misc]
                found = await outcomes(engine)
            for got, want, failed in zip(found, expected, concerned[at], strict=True):
                if failed:
                    assert has_failed(got)
                else:
                    assert got == want
        assert engine.statistics().n_failed == sum(sum(concerned[key]) for key in some)
        assert await outcomes(engine) == expected


@pytest.mark.parametrize("defer", [0, 2])
async def test_whatever_fails_each_request_has_its_tokens_or_a_typed_error(
    tmp_path: Path, device: str, defer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path, num_experts_per_tok=6)
    expected = await undisturbed(model, defer=defer)
    async with opened(model, device=device, defer=defer) as engine:
        rng, broken = Random(1), set[tuple[int, int]]()
        found: list[Outcome] = []

        def fails(layer: int, expert: int, in_slot: bool) -> bool:
            return rng.random() < 0.2 if in_slot else (layer, expert) in broken

        with monkeypatch.context() as patch:
            break_copies(patch, lambda layer, expert: rng.random() < 0.2)
            break_experts(patch, fails)
            for turn in range(6):  # in every other one an expert is broken wherever its weights are
                broken = {(rng.randrange(N_LAYERS), rng.randrange(N_EXPERTS))} if turn % 2 else set()
                found += await outcomes(engine)
        for got, want in zip(found, expected * 6, strict=True):
            assert got == want or has_failed(got)
        assert 0 < sum(isinstance(got, Exception) for got in found) < len(found)
        assert await outcomes(engine) == expected


@pytest.mark.parametrize("layer", range(N_LAYERS))
async def test_deferred_experts_that_fail_end_the_requests_that_visit_them(
    tmp_path: Path, device: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failing for good, late or not: what is not there is never taken for a result."""
    model = save_tiny(tmp_path, num_experts_per_tok=6)
    expected = await undisturbed(model, defer=2)
    async with opened(model, device=device, defer=2, waves="one") as engine:
        assert engine._loop is not None
        with monkeypatch.context() as patch:
            taken: list[Failures] = []
            take = ModelWave.take

            def noting(self: ModelWave, done: LayerDone) -> None:
                taken.append(done.late_failures)
                take(self, done)

            patch.setattr(ModelWave, "take", noting)
            break_experts(patch, lambda at, expert, in_slot: at == layer and expert % 2 == 0)
            for got in await outcomes(engine):
                assert has_failed(got)
        assert any(taken) == (layer < N_LAYERS - 1)
        assert await outcomes(engine) == expected


async def test_a_dead_cpu_lane_fails_the_loads_that_need_it(
    tiny: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(tiny)
    with monkeypatch.context() as patch:
        break_lane(patch, "cpu", after=3)
        async with opened(tiny, device=device, slots=2, planner="all-cpu") as engine:
            found = await outcomes(engine)
            assert any(isinstance(got, Exception) for got in found)
            for got, want in zip(found, expected, strict=True):
                assert got == want or has_failed(got)
        async with opened(tiny, device=device, slots=N_LAYERS * N_EXPERTS) as engine:
            assert await outcomes(engine) == expected  # every expert has a slot: nobody needs the CPU


async def test_on_the_cpu_alone_a_dead_lane_fails_every_request(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_lane(patch, "cpu", after=0)
        async with opened(tiny, device="cpu") as engine:
            for _ in range(2):
                for got in await outcomes(engine):
                    assert has_failed(got)


@pytest.mark.parametrize("where", ["start", "handle", "take", "advance"])
async def test_an_error_inside_a_step_ends_its_requests_and_the_next_run(
    tiny: Path, device: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(tiny)
    async with opened(tiny, device=device) as engine:
        assert engine._loop is not None
        rig = engine._loop._rig
        with monkeypatch.context() as patch:
            match where:
                case "start":
                    patch.setattr(type(rig.lanes), "start", raise_broken)
                case "handle":
                    patch.setattr(rig.scheduler._placing, "plan", raise_broken)
                case _:
                    patch.setattr(ModelWave, where, raise_broken)
            for got in await outcomes(engine):
                assert has_failed(got)
        if where != "start":  # those lanes are dead for good
            assert await outcomes(engine) == expected


def raise_broken(*_: object, **__: object) -> None:
    raise BROKEN


# Callers that leave


async def test_a_caller_may_leave_after_any_event(tiny: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other requests get their tokens, whatever the leaving one had in flight."""
    expected = await undisturbed(tiny)
    async with opened(tiny, device=device) as engine:
        leaving: list[TokenStream] = []
        left = [0]
        handle = Scheduler.handle

        def counting(self: Scheduler, event: Event, now_s: float) -> Any:
            left[0] -= 1
            if left[0] == 0 and leaving:
                leaving.pop()._end()
            return handle(self, event, now_s)

        monkeypatch.setattr(Scheduler, "handle", counting)
        for n_events in range(1, 120, 5):
            stream = engine.generate_stream("Somebody who leaves", greedy(FOREVER))
            leaving[:] = [stream]
            left[0] = n_events
            found = await outcomes(engine, PROMPTS[:2])
            await stream.aclose()
            assert found == expected[:2]
            await settled(engine)


async def settled(engine: Engine) -> None:
    while (now := engine.statistics()).n_running or now.n_waiting or now.kv_bytes:
        await anyio.sleep(0.002)


@pytest.mark.parametrize(
    ("device", "n_events"),
    [*product([WALL], [1, 3, 8, 21]), *product([VIRTUAL], [2, 5, 13, 34])],
    indirect=["device"],
)
async def test_an_engine_may_be_closed_after_any_event(
    tiny: Path, device: str, n_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [0]
    handle = Scheduler.handle

    def counting(self: Scheduler, event: Event, now_s: float) -> Any:
        seen[0] += isinstance(event, JobDone)
        return handle(self, event, now_s)

    monkeypatch.setattr(Scheduler, "handle", counting)
    ended: list[type[Exception]] = []

    async def forever(engine: Engine, prompt: str) -> None:
        try:
            await engine.generate(prompt, greedy(FOREVER))
        except EngineClosedError as error:
            ended.append(type(error))

    async with anyio.create_task_group() as group, opened(tiny, device=device) as engine:
        for prompt in PROMPTS:
            group.start_soon(forever, engine, prompt)
        while seen[0] < n_events:
            await lowlevel.checkpoint()
    assert ended == [EngineClosedError] * len(PROMPTS)


# Races in wall time


@pytest.mark.parametrize("waves", ["one", "two"])
@pytest.mark.parametrize("slots", [1, 3, 8])
async def test_in_wall_time_tokens_do_not_depend_on_what_lands_when(tiny: Path, waves: str, slots: int) -> None:
    expected = await undisturbed(tiny)
    async with opened(tiny, device=WALL, slots=slots, planner="auto", promote=True, waves=waves) as engine:
        for _ in range(4):
            assert await outcomes(engine) == expected
