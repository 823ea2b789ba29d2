"""An engine's life: streams that run to their end, are left, cancelled, dropped, or outlive their engine."""

import gc
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from safetensors.torch import load_file, save_file

from fiddler import (
    CheckpointError,
    ConfigError,
    Engine,
    EngineClosedError,
    EngineConfig,
    EngineFailedError,
    GenerationConfig,
    GenerationError,
    PromptError,
    Statistics,
    Timing,
)
from fiddler.engine.loop import EngineLoop
from fiddler.lab.machine import machines
from fiddler.lanes.experts import ExpertWork
from fiddler.models import seam
from fiddler.models.kv import KvArena
from fiddler.models.loaded import load
from fiddler.scheduler.messages import Failures, Job
from fiddler.steps.request import KvRoom, Reserved
from tests.support.covering import covering
from tests.support.tiny import N_EXPERTS, N_LAYERS, TOP_K, save_tiny

pytestmark = pytest.mark.anyio

FOREVER = 400
"""More tokens than any test waits for."""
VIRTUAL = "sim:rtx4090-desktop"
N_SLOTS = N_LAYERS * N_EXPERTS // 4
EXPERT_BYTES = 3 * 64 * 32 * 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


async def settled(engine: Engine) -> Statistics:
    """Wait until nothing is in flight. Raises `TimeoutError` if something stays."""
    with anyio.fail_after(20):
        while (now := engine.statistics()).n_running or now.n_waiting or now.kv_bytes or now.n_kv_tokens:
            await anyio.sleep(0.005)
    return now


async def until_waiting(engine: Engine, n: int) -> Statistics:
    """Wait until `n` requests wait. Raises `TimeoutError` if they do not."""
    with anyio.fail_after(20):
        while (now := engine.statistics()).n_waiting != n:
            await anyio.sleep(0.001)
    return now


@asynccontextmanager
async def opened(model: Path, **options: Any) -> AsyncIterator[Engine]:
    async with Engine(model, EngineConfig(**options)) as engine:
        yield engine
        await settled(engine)


def greedy(n: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1)


async def test_iterating_gives_every_token_and_the_last_one_says_why_it_ended(tiny: Path) -> None:
    async with opened(tiny) as engine:
        tokens = [token async for token in engine.generate_stream("Once upon a time", greedy(8))]
        result = await engine.generate("Once upon a time", greedy(8))
    assert [t.finish_reason for t in tokens] == [None] * 7 + ["length"]
    assert [t.usage for t in tokens[:-1]] == [None] * 7
    assert tokens[-1].usage == result.usage
    assert result.usage.completion_tokens == 8
    assert tuple(t.id for t in tokens) == result.token_ids
    assert "".join(t.text for t in tokens) == result.text


async def test_awaiting_a_stream_waits_for_admission_and_returns_it(tiny: Path) -> None:
    async with opened(tiny) as engine:
        stream = await engine.generate_stream("Hello", greedy(3))
        assert engine.statistics().n_requests == 1
        async with stream:
            assert len([token async for token in stream]) == 3
        assert [token async for token in stream] == []


async def test_text_ids_and_chat_are_one_prompt_in_three_forms(tiny: Path) -> None:
    async with opened(tiny) as engine:
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        messages = [{"role": "user", "content": "Hello"}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        from_chat = await engine.generate(messages, greedy(6))
        from_ids = await engine.generate(ids, greedy(6))
    assert from_chat.token_ids == from_ids.token_ids


async def test_leaving_the_block_ends_the_request(tiny: Path) -> None:
    async with opened(tiny) as engine:
        async with engine.generate_stream("Hello", greedy(FOREVER)) as stream:
            await anext(stream)
        now = await settled(engine)
        assert (now.n_cancelled, now.n_finished) == (1, 0)


async def test_a_dropped_stream_ends_its_request(tiny: Path) -> None:
    async with opened(tiny) as engine:
        stream = await engine.generate_stream("Hello", greedy(FOREVER))
        await anext(stream)
        del stream
        gc.collect()
        assert (await settled(engine)).n_cancelled == 1


async def test_cancelling_the_consumer_ends_the_request(tiny: Path) -> None:
    async def consume(engine: Engine, started: anyio.Event) -> None:
        async for _ in engine.generate_stream("Hello", greedy(FOREVER)):
            started.set()

    async with opened(tiny) as engine:
        started = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(consume, engine, started)
            await started.wait()
            group.cancel_scope.cancel()
        gc.collect()
        assert (await settled(engine)).n_cancelled == 1


async def test_a_cancelled_wait_loses_no_token(tiny: Path) -> None:
    async with opened(tiny) as engine:
        whole = await engine.generate("Hello", greedy(12))
        stream = engine.generate_stream("Hello", greedy(12))
        got: list[int] = []
        while not got or len(got) < 12:
            with anyio.move_on_after(0.0005):
                got.append((await anext(stream)).id)
    assert tuple(got) == whole.token_ids


async def test_a_slow_consumer_delays_nobody(tiny: Path) -> None:
    async with opened(tiny) as engine, engine.generate_stream("Hello", greedy(20)) as slow:
        await slow
        quick = await engine.generate("Hello", greedy(20))
        with anyio.fail_after(20):
            while engine.statistics().n_finished < 2:
                await anyio.sleep(0.005)
        # Nobody has read from the slow one yet, and all of it is there.
        assert tuple([t.id async for t in slow]) == quick.token_ids


async def test_a_token_says_when_it_was_made_whoever_reads_it_when(tiny: Path) -> None:
    async with opened(tiny) as engine:
        submitted_s = perf_counter()
        stream = engine.generate_stream([1, 2], greedy(8))
        with anyio.fail_after(30):
            while engine.statistics().n_new_tokens < 8:
                await anyio.sleep(0.001)
        made_s = perf_counter()
        tokens = [token async for token in stream]
        result = await engine.generate([1, 2], greedy(8))

    times = [submitted_s, *(token.made_s for token in tokens), made_s]
    assert times == sorted(times)
    assert len({*times}) == 10
    timing = Timing.of(tokens, submitted_s)
    assert timing.tokens_per_s == pytest.approx(7 / (times[8] - times[1]))
    assert 0 < result.timing.first_token_s < result.timing.total_s
    assert Timing.of([], submitted_s) == Timing(0.0, 0.0, 0)


async def test_closing_ends_what_is_in_flight_after_the_tokens_already_made(tiny: Path) -> None:
    async with Engine(tiny, EngineConfig(max_running=1)) as engine:
        running = await engine.generate_stream("Hello", greedy(FOREVER))
        waiting = engine.generate_stream("Hello", greedy(4))
        first = await anext(running)
        assert first.finish_reason is None
    with pytest.raises(EngineClosedError, match="in flight"):
        async for _ in running:
            pass
    with pytest.raises(EngineClosedError, match="in flight"):
        await waiting
    with pytest.raises(EngineClosedError, match="not open"):
        engine.generate_stream("Hello")
    now = engine.statistics()
    assert (now.n_running, now.n_waiting, now.kv_bytes, now.n_cancelled) == (0, 0, 0, 2)


async def test_requests_beyond_max_running_wait_their_turn(tiny: Path) -> None:
    async with opened(tiny, max_running=2, chunk_tokens=4) as engine:
        alone = [(await engine.generate([5 + i, 6, 7], greedy(9))).token_ids for i in range(5)]
        streams = [engine.generate_stream([5 + i, 6, 7], greedy(9)) for i in range(5)]
        together = [tuple([t.id async for t in stream]) for stream in streams]
    assert together == alone


async def test_requests_hold_no_more_keys_than_there_is_room_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Noting(KvRoom):
        def reserve(self, n_tokens: int) -> Reserved | None:
            found = super().reserve(n_tokens)
            seen.append(self.n_reserved)
            return found

    monkeypatch.setattr("fiddler.engine.loop.KvRoom", Noting)
    prompts = [[5 + i, 6, 7] for i in range(5)]
    async with opened(tiny) as engine:
        alone = [(await engine.generate(prompt, greedy(9))).token_ids for prompt in prompts]
    assert seen == [12] * 5
    async with opened(tiny, kv_tokens=25) as engine:  # two of 12 tokens each, and one to spare
        streams = [engine.generate_stream(prompt, greedy(9)) for prompt in prompts]
        together = [tuple([t.id async for t in stream]) for stream in streams]
    assert together == alone
    assert max(seen) <= 24


async def test_a_request_that_waits_for_room_is_not_overtaken(tiny: Path) -> None:
    async with opened(tiny, kv_tokens=FOREVER) as engine:
        running = await engine.generate_stream([5], greedy(FOREVER - 50))
        large, small = engine.generate_stream([6], greedy(100)), engine.generate_stream([7], greedy(1))
        now = await until_waiting(engine, 2)
        assert (now.n_running, now.n_kv_tokens) == (1, FOREVER - 49)
        await anext(running)
        await anext(running)
        assert engine.statistics().n_waiting == 2, "the small one has room and waits all the same"
        await running.aclose()
        await small
        assert engine.statistics().n_requests == 3
        assert len([t async for t in large]) == 100


@pytest.mark.parametrize("ending", ["finished", "left", "dropped", "failed", "no token"])
async def test_room_returns_however_a_request_ends(
    tiny: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: seam.Forward, call: seam.ExpertsCall) -> None:
        raise OSError("the disk is gone")

    async with opened(tiny, kv_tokens=FOREVER) as engine:
        if ending == "finished":
            assert (await engine.generate([5] * (FOREVER - 2), greedy(2))).finish_reason == "length"
        elif ending == "failed":
            with monkeypatch.context() as patch:
                patch.setattr(seam.Forward, "suspend", fail)
                with pytest.raises(EngineFailedError, match="disk is gone"):
                    await engine.generate([5], greedy(FOREVER - 1))
        elif ending == "no token":
            every = list(range(1000))
            with pytest.raises(GenerationError, match="no token"):
                await engine.generate([5], begin_suppress_tokens=every, max_new_tokens=FOREVER - 1)
        else:
            stream = await engine.generate_stream([5], greedy(FOREVER - 1))
            assert engine.statistics().n_kv_tokens == FOREVER
            waits = engine.generate_stream([6] * (FOREVER - 2), greedy(2))
            await until_waiting(engine, 1)
            if ending == "left":
                await stream.aclose()
            del stream
            gc.collect()
            assert len([t async for t in waits]) == 2
        assert (await settled(engine)).n_kv_tokens == 0
        again = await engine.generate([7] * (FOREVER - 2), greedy(2))
        assert again.usage.total_tokens == FOREVER


async def test_who_leaves_while_waiting_for_room_lets_the_next_in(tiny: Path) -> None:
    async with opened(tiny, kv_tokens=FOREVER) as engine:
        running = await engine.generate_stream([5], greedy(FOREVER - 50))
        first, second = engine.generate_stream([6], greedy(100)), engine.generate_stream([7], greedy(20))
        await until_waiting(engine, 2)
        await first.aclose()
        assert len([t async for t in second]) == 20
        now = engine.statistics()
        assert (now.n_requests, now.n_cancelled, now.n_running) == (2, 1, 1)
        await running.aclose()


async def test_closing_ends_who_waits_for_room(tiny: Path) -> None:
    async with Engine(tiny, EngineConfig(kv_tokens=FOREVER)) as engine:
        running = await engine.generate_stream([5], greedy(FOREVER - 1))
        queued = engine.generate_stream([6], greedy(20))
        await until_waiting(engine, 1)
    for stream in (running, queued):
        with pytest.raises(EngineClosedError, match="in flight"):
            async for _ in stream:
                pass
    now = engine.statistics()
    assert (now.n_running, now.n_waiting, now.n_kv_tokens, now.n_cancelled) == (0, 0, 0, 2)


async def test_a_request_that_can_never_have_room_is_refused(tiny: Path) -> None:
    async with opened(tiny, kv_tokens=20) as engine:
        other = engine.generate_stream([5], greedy(19))
        with pytest.raises(
            PromptError, match=r"max_new_tokens=18 exceed kv_tokens=20; .* at most 17, or set kv_tokens"
        ):
            await engine.generate([5, 6, 7], greedy(18))
        with pytest.raises(
            PromptError, match=r"20 tokens leave no room within kv_tokens=20; .* set kv_tokens higher"
        ):
            await engine.generate([5] * 20, greedy(1))
        assert len([t async for t in other]) == 19
        whole = await engine.generate([5, 6, 7])
        assert whole.usage.completion_tokens == 17, "who names no length may fill what there is"
    async with opened(tiny, kv_tokens=10_000) as engine:
        with pytest.raises(PromptError, match=r"exceed the context of \d+; set max_new_tokens to at most \d+$"):
            await engine.generate([5], greedy(5000))


async def test_an_engine_over_an_arena_makes_the_same_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5 + i] * (3 + 4 * i) for i in range(6)]
    rooms: list[KvRoom] = []

    def over_an_arena(n_tokens: int | None, arena: KvArena | None) -> KvRoom:
        assert n_tokens is not None
        assert arena is None
        rooms.append(KvRoom(n_tokens, KvArena(n_tokens)))
        return rooms[0]

    async def together(engine: Engine) -> list[tuple[int, ...]]:
        streams = [engine.generate_stream(prompt, greedy(9 + i)) for i, prompt in enumerate(prompts)]
        left = engine.generate_stream([9], greedy(20))
        await anext(left)
        await left.aclose()
        return [tuple([t.id async for t in stream]) for stream in streams]

    async with opened(tiny, chunk_tokens=8, kv_tokens=70) as engine:
        growing = await together(engine)
    monkeypatch.setattr("fiddler.engine.loop.KvRoom", over_an_arena)
    async with opened(tiny, chunk_tokens=8, kv_tokens=70) as engine:
        assert await together(engine) == growing
    rooms[0].check()
    assert rooms[0].n_reserved == 0


async def test_bad_requests_fail_alone(tiny: Path) -> None:
    async with opened(tiny) as engine:
        good = engine.generate_stream("Hello", greedy(6))
        with pytest.raises(PromptError, match="empty"):
            await engine.generate("")
        with pytest.raises(PromptError, match="vocabulary"):
            await engine.generate([10**6])
        with pytest.raises(PromptError, match="max_new_tokens"):
            await engine.generate("Hello", max_new_tokens=10**6)
        with pytest.raises(PromptError, match="too long"):
            await engine.generate([3] * 10**5)
        with pytest.raises(GenerationError, match=r"max_new_token\b"):
            engine.generate_stream("Hello", max_new_token=3)
        assert len([t async for t in good]) == 6


async def test_a_failing_step_ends_its_requests_only(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tiny) as engine:
        before = await engine.generate("Hello", greedy(4))

        def fail(self: seam.Forward, call: seam.ExpertsCall) -> None:
            raise OSError("the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(seam.Forward, "suspend", fail)
            with pytest.raises(EngineFailedError, match="disk is gone") as caught:
                await engine.generate("Hello", greedy(4))
        assert isinstance(caught.value.__cause__, OSError)
        assert (await engine.generate("Hello", greedy(4))).token_ids == before.token_ids
        now = await settled(engine)
    assert (now.n_requests, now.n_finished, now.n_failed) == (3, 2, 1)


@pytest.mark.parametrize("asked", [{}, {"seed": 1}, {"repetition_penalty": 1.1, "logprobs": True}], ids=str)
async def test_logits_that_are_no_numbers_fail_their_request_only(tmp_path: Path, asked: dict[str, Any]) -> None:
    folder = save_tiny(tmp_path, "mixtral")
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][7] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    async with opened(folder) as engine:
        expected = await engine.generate([20, 21, 22], greedy(12))
        beside = engine.generate_stream([20, 21, 22], greedy(12))
        await anext(beside)
        with pytest.raises(EngineFailedError, match=r"logits are not numbers.* damaged.* dtype=") as caught:
            await engine.generate([30, 7, 31], max_new_tokens=5, **asked)
        assert isinstance(caught.value.__cause__, FloatingPointError)
        assert [token.id async for token in beside] == list(expected.token_ids[1:])
        assert (await engine.generate([20, 21, 22], greedy(12))).token_ids == expected.token_ids


async def test_eos_and_stop_strings_stop(tiny: Path) -> None:
    async with opened(tiny) as engine:
        free = await engine.generate("Hello", greedy(60))
        eos = free.token_ids[5]
        n = free.token_ids.index(eos) + 1
        at_eos = await engine.generate("Hello", greedy(60), eos_token_id=eos)
        assert (at_eos.token_ids, at_eos.finish_reason) == (free.token_ids[:n], "stop")
        middle = len(free.text) // 2
        stop = free.text[middle : middle + 2]
        stopped = await engine.generate("Hello", greedy(60), stop_strings=[stop])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 60


async def test_sampling_repeats_with_a_seed_and_differs_between_seeds(tiny: Path) -> None:
    async with opened(tiny) as engine:

        async def sample(seed: int) -> tuple[int, ...]:
            result = await engine.generate("Hello", seed=seed, temperature=1.5, max_new_tokens=12)
            return result.token_ids

        assert await sample(1) == await sample(1)
        assert len({await sample(seed) for seed in range(4)}) > 1


async def test_logprobs_are_given_when_asked_for(tiny: Path) -> None:
    async with opened(tiny) as engine:
        plain = await engine.generate("Hello", greedy(4))
        asked = await engine.generate("Hello", greedy(4), logprobs=True)
    assert plain.logprobs is None
    assert asked.logprobs is not None
    assert len(asked.logprobs) == 4
    assert all(value < 0 for value in asked.logprobs)


async def test_a_long_prompt_does_not_stop_a_running_request(tiny: Path) -> None:
    async with opened(tiny, chunk_tokens=8) as engine, engine.generate_stream("Hello", greedy(40)) as running:
        await anext(running)
        n_before = engine.statistics().n_new_tokens
        long = engine.generate_stream([7] * 160, greedy(1))
        await anext(long)
        assert engine.statistics().n_new_tokens - n_before >= 160 // 8


async def test_opening_a_missing_model_raises_and_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        async with Engine(tmp_path / "nothing"):
            pass
    with anyio.fail_after(10):
        while any(thread.name == "fiddler-engine" for thread in threading.enumerate()):
            await anyio.sleep(0.01)


async def test_a_gpu_that_is_not_there_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^device='cuda': torch sees no CUDA device"):
        async with opened(tiny, device="cuda"):
            pass


def test_plain_transformers_gets_its_experts_from_the_files_beside_a_gpu_too(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    resolved = load(tiny, EngineConfig(), packed=False).resolved
    assert (resolved.device, resolved.store) == ("cpu", "mapped")


async def test_statistics_count_what_was_done(tiny: Path) -> None:
    async with opened(tiny) as engine:
        await engine.generate([4, 5, 6], greedy(5))
        now = await settled(engine)
    assert (now.n_requests, now.n_finished, now.n_prompt_tokens, now.n_new_tokens) == (1, 1, 3, 5)
    assert now.n_steps == 5
    assert now.n_expert_rows > 0
    assert now.expert_bytes > 0
    assert 0 < now.expert_s < now.step_s


def test_two_engines_in_threads_of_their_own(tiny: Path) -> None:
    async def run() -> tuple[int, ...]:
        async with Engine(tiny) as a, Engine(tiny) as b:
            one, other = a.generate_stream("Hello", greedy(8)), b.generate_stream("Hello", greedy(8))
            left = tuple([t.id async for t in one])
            assert left == tuple([t.id async for t in other])
            return left

    assert anyio.run(run) == anyio.run(run, backend="trio")


async def test_what_a_step_changed_is_published_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[int] = []
    publish, step = EngineLoop._publish, EngineLoop._step

    def counted(self: EngineLoop) -> None:
        published.append(self._counters.n_steps)
        publish(self)

    def told(self: EngineLoop) -> None:
        assert not self._outbox, "a step may take long: who was admitted has been told"
        step(self)

    monkeypatch.setattr(EngineLoop, "_publish", counted)
    monkeypatch.setattr(EngineLoop, "_step", told)
    async with opened(tiny) as engine:
        await engine.generate([5], greedy(9))
    assert [published.count(n_steps) for n_steps in range(1, 9)] == [1] * 8


@pytest.mark.parametrize(("threads", "expected"), [(None, 1), (3, 3)])
async def test_threads_are_the_engines_own(
    tiny: Path, threads: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[str, int]] = set()
    work = ExpertWork.__call__

    def noting(self: ExpertWork, job: Job) -> Failures:
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        return work(self, job)

    monkeypatch.setattr(ExpertWork, "__call__", noting)
    before = torch.get_num_threads()
    async with opened(tiny, **({} if threads is None else {"threads": threads})) as engine:
        await engine.generate("Hello", greedy(2))
        assert torch.get_num_threads() == before
    assert seen == {("fiddler-engine", expected)}  # tiny experts are not shared between threads
    assert await anyio.to_thread.run_sync(torch.get_num_threads) == before


async def used(model: Path, **options: Any) -> Statistics:
    """What an engine had done when it was closed, after a prompt of 5 tokens and 8 new ones."""
    async with opened(model, **options) as engine:
        await engine.generate([4, 5, 6, 7, 8], greedy(8))
    return engine.statistics()


N_VISITS = (5 + 7) * N_LAYERS * TOP_K  # the last token is not run


@pytest.mark.parametrize(
    ("device", "planner", "anyio_backend"),
    covering(["sim", VIRTUAL], ["auto", "all-cpu", "all-fetch"], ["asyncio", "trio"]),
)
async def test_statistics_say_where_experts_ran(tiny: Path, device: str, planner: str) -> None:
    now = await used(tiny, device=device, planner=planner)

    assert now.cpu.n_rows + now.gpu.n_rows == now.n_expert_rows == N_VISITS
    assert now.gpu.n_loads == now.n_hits + now.n_fetches
    for lane in (now.cpu, now.gpu, now.link):
        assert lane.n_bytes == lane.n_loads * EXPERT_BYTES
        assert (lane.busy_s > 0) == (lane.n_loads > 0)
    # Slots are filled when the engine opens; at its end a copy may be on its way.
    assert N_SLOTS <= now.link.n_loads <= N_SLOTS + now.n_fetches + now.n_promotions + now.prefetch.n_issued
    assert now.n_fallbacks == 0
    assert now.n_slots == N_SLOTS
    assert 0 < now.n_slots_used <= now.n_slots
    assert now.n_hits > 0 or planner == "auto"
    assert now.prediction_error >= 0
    assert now.step_s > 0
    if planner == "all-cpu":
        assert now.n_fetches == 0
    if planner == "all-fetch":
        assert now.n_fetches > 0


async def test_without_an_accelerator_everything_runs_on_the_cpu(tiny: Path) -> None:
    for options in ({"device": "cpu"}, {"device": "sim", "slots": 0}, {"device": VIRTUAL, "slots": 0}):
        now = await used(tiny, **options)
        assert now.cpu.n_rows == N_VISITS
        assert now.gpu.n_loads == now.link.n_loads == now.n_slots == now.n_slots_used == 0
        assert now.n_hits == now.n_fetches == now.n_promotions == 0


async def test_there_are_no_more_slots_than_experts(tiny: Path) -> None:
    now = await used(tiny, device=VIRTUAL, slots=1000)
    assert now.n_slots == N_LAYERS * N_EXPERTS


async def test_nothing_is_promoted_unless_asked_for(tiny: Path) -> None:
    now = await used(tiny, device=VIRTUAL, planner="all-cpu", promote=False, prefetch="off")
    assert now.n_promotions == now.n_fetches == now.prefetch.n_issued == 0
    assert now.link.n_loads == now.n_slots_used == N_SLOTS  # as they were filled at the start


async def test_virtual_time_repeats_and_is_not_the_wall_clocks(tiny: Path) -> None:
    first, second = [await used(tiny, device=VIRTUAL) for _ in range(2)]
    assert first.step_s == second.step_s
    assert (first.n_hits, first.n_fetches, first.n_promotions) == (
        second.n_hits,
        second.n_fetches,
        second.n_promotions,
    )
    assert first.prediction_error < 1e-6


@pytest.mark.parametrize("device", ["cpu", VIRTUAL])
async def test_a_trace_is_kept_only_if_asked_for(tiny: Path, device: str) -> None:
    async with opened(tiny, device=device) as engine:
        await engine.generate("Hello", greedy(2))
        with pytest.raises(ConfigError, match="set trace=True"):
            engine.trace()


@pytest.mark.parametrize(
    ("device", "lanes"), [("cpu", {"cpu"}), ("sim", {"cpu", "link"}), (VIRTUAL, {"cpu", "link"})]
)
async def test_a_trace_holds_every_job_and_every_decision(tiny: Path, device: str, lanes: set[str]) -> None:
    async with opened(tiny, device=device, planner="all-cpu", trace=True) as engine:
        await engine.generate("Hello", greedy(8))
    trace, now = engine.trace(), engine.statistics()
    assert {span.lane for span in trace.spans} - {"gpu"} == lanes
    n_copies = now.n_slots + now.n_fetches + now.n_promotions + now.prefetch.n_issued
    assert len([span for span in trace.spans if span.lane == "link"]) == n_copies
    assert all(span.start_s <= span.end_s for span in trace.spans)
    assert len(trace.decisions) == now.n_steps * N_LAYERS
    assert sum(decision.n_rows for decision in trace.decisions) == now.n_expert_rows
    assert {event["ph"] for event in trace.chrome()["traceEvents"]} >= {"M", "X", "i"}


async def test_an_unopened_engine_has_no_trace(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="no timeline is traced"):
        Engine(tiny, EngineConfig(trace=True)).trace()


@pytest.mark.parametrize("device", ["sim", VIRTUAL])
async def test_a_warm_start_is_written_at_the_end_and_read_at_the_next_start(
    tiny: Path, tmp_path: Path, device: str
) -> None:
    file, unused = tmp_path / "new" / "scores.json", tmp_path / "unused.json"
    await used(tiny, device=device, warm_start=file)
    learnt = file.read_text()
    async with opened(tiny, device=device, warm_start=unused):
        pass
    async with opened(tiny, device=device, warm_start=file):
        assert file.read_text() == learnt
    assert file.read_text() == learnt != unused.read_text()
    await used(tiny, device="cpu", warm_start=file)  # has no slots, and learns nothing
    assert file.read_text() == learnt
    await used(tiny, device=device, warm_start=file)
    assert file.read_text() != learnt
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "other", [{"num_experts": N_EXPERTS * 2}, {"num_hidden_layers": N_LAYERS - 1}, {"policy": "lru"}, {}], ids=str
)
async def test_a_warm_start_of_another_model_or_policy_is_refused(
    tiny: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    file = tmp_path / "scores.json"
    await used(tiny, device=VIRTUAL, warm_start=file)
    if not other:
        file.write_text(file.read_text()[:-10])
    policy = other.pop("policy", "aged-lfu")
    model = save_tiny(tmp_path / "other", **other) if other else tiny
    before = file.read_text()
    with pytest.raises(ConfigError, match=r"^warm_start=.*scores\.json' cannot be used: .*another file"):
        async with opened(model, device=VIRTUAL, warm_start=file, policy=policy):
            pass
    assert file.read_text() == before


async def test_a_warm_start_with_an_impossible_name_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^warm_start=.* cannot be used: .*another file"):
        async with opened(tiny, device=VIRTUAL, warm_start=tmp_path / ("1" * 5000)):
            raise AssertionError("it opened")


@pytest.mark.parametrize("device", ["cpu", VIRTUAL])
async def test_deferring_needs_many_experts_a_token(tiny: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"^defer=1 needs .* at least 6 .* has {TOP_K}: set defer=0"):
        async with opened(tiny, device=device, defer=1):
            pass
    for top_k in (5, 6):
        model = save_tiny(tmp_path / str(top_k), num_experts_per_tok=top_k)
        if top_k < 6:
            with pytest.raises(ConfigError, match=f"^defer=2 .* has {top_k}"):
                await used(model, device=device, defer=2)
        else:
            now = await used(model, device=device, defer=2)
            assert now.n_expert_rows == N_VISITS // TOP_K * top_k


async def test_an_unknown_machine_is_named_beside_the_known(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=f"'nope'.*{', '.join(machines())}"):
        async with opened(tiny, device="sim:nope"):
            pass


def lane_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name in {"fiddler-cpu", "fiddler-gpu", "fiddler-link"}]


async def test_a_failed_opening_of_an_accelerator_leaves_no_thread(tiny: Path) -> None:
    before = lane_threads()
    with pytest.raises(ConfigError, match="defer"):
        async with opened(tiny, device="sim", defer=1):
            pass
    assert lane_threads() == before


async def test_closing_ends_the_lanes(tiny: Path) -> None:
    before = lane_threads()
    async with Engine(tiny, EngineConfig(device="sim")) as engine:
        running = await engine.generate_stream("Hello", greedy(FOREVER))
        await anext(running)
        assert len(lane_threads()) == len(before) + 3
    assert lane_threads() == before
    with pytest.raises(EngineClosedError, match="in flight"):
        async for _ in running:
            pass


async def test_the_process_s_default_dtype_changes_no_token(tiny: Path) -> None:
    async with opened(tiny, kernels="linear") as engine:

        async def sampled() -> list[tuple[int, ...]]:
            asked = {"temperature": 1.3, "sequence_bias": [[[40], 0.7]], "max_new_tokens": 12}
            return [(await engine.generate("Hello", seed=seed, **asked)).token_ids for seed in range(3)]

        expected, before = await sampled(), torch.get_default_dtype()
        try:
            for dtype in (torch.bfloat16, torch.float64):
                torch.set_default_dtype(dtype)
                assert await sampled() == expected
        finally:
            torch.set_default_dtype(before)
