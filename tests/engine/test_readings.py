"""Prompts on their way into the engine: no prompt delays another's tokens, and each is refused alone."""

import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from fiddler import (
    Engine,
    EngineClosedError,
    EngineConfig,
    EngineFailedError,
    GenerationConfig,
    PromptError,
    Statistics,
)
from fiddler.engine import waiting
from fiddler.text import reading
from tests.support.tiny import CONTEXT, TEMPLATE, save_tiny
from tests.text.test_reading import ENDLESS, exists

pytestmark = pytest.mark.anyio
STUCK = [{"role": "user", "content": "stuck"}]
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose template does not end where a message says "stuck"."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    template = "{% if messages[0].content == 'stuck' %}" + ENDLESS + "{% endif %}" + TEMPLATE
    (folder / "chat_template.jinja").write_text(template)
    return folder


def greedy(n: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1)


async def settled(engine: Engine) -> Statistics:
    with anyio.fail_after(30):
        while (now := engine.statistics()).n_running or now.n_waiting or now.kv_bytes or now.n_kv_tokens:
            await anyio.sleep(0.005)
    return now


@asynccontextmanager
async def opened(model: Path, **options: Any) -> AsyncIterator[Engine]:
    async with Engine(model, EngineConfig(**options)) as engine:
        yield engine
        await settled(engine)


async def test_a_stuck_template_holds_up_nobody(tiny: Path) -> None:
    async with opened(tiny) as engine:
        await engine.generate(CHAT, greedy(1))
        stuck = [engine.generate_stream(STUCK, greedy(4)) for _ in range(2)]
        with anyio.fail_after(30):
            for prompt in ("Hello", [5, 6, 7], CHAT):
                assert (await engine.generate(prompt, greedy(6))).usage.completion_tokens == 6
            assert await anyio.to_thread.run_sync(engine.count_tokens, CHAT) > 0
        assert engine.statistics().n_waiting == 2
        for stream in stuck:
            await stream.aclose()
        now = await settled(engine)
        assert now.n_cancelled == 2


async def test_it_ends_in_a_prompt_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tiny) as engine, engine.generate_stream("Hello", greedy(300)) as running:
        await anext(running)
        monkeypatch.setattr(reading, "LIMIT_S", 0.5)
        with anyio.fail_after(60), pytest.raises(PromptError, match="the chat template took too long"):
            await engine.generate(STUCK, greedy(4))
        with pytest.raises(PromptError, match="the chat template took too long"):
            await anyio.to_thread.run_sync(engine.count_tokens, STUCK)
        assert len([token async for token in running]) == 299
        assert (await engine.generate(CHAT, greedy(4))).usage.completion_tokens == 4


async def test_more_stuck_prompts_than_threads_leave_token_ids_alone(tiny: Path) -> None:
    async with opened(tiny) as engine:
        stuck = [engine.generate_stream(STUCK, greedy(4)) for _ in range(8)]
        with anyio.fail_after(30):
            assert (await engine.generate([5, 6, 7], greedy(6))).usage.completion_tokens == 6
        for stream in stuck:
            await stream.aclose()
        with anyio.fail_after(30):
            assert (await engine.generate(CHAT, greedy(6))).usage.completion_tokens == 6


async def test_closing_ends_who_is_being_read(tiny: Path) -> None:
    async with Engine(tiny) as engine:
        await engine.generate(CHAT, greedy(1))
        server = engine._loaded.text._reader._server._process.pid  # type: ignore[union-attr]
        stuck = [engine.generate_stream(STUCK, greedy(4)) for _ in range(6)]
        await anyio.sleep(0.05)
        with anyio.fail_after(30):
            await engine.aclose()
    for stream in stuck:
        with anyio.fail_after(30), pytest.raises(EngineClosedError):
            await stream
    assert not exists(server)
    assert not [thread for thread in threading.enumerate() if thread.name == "fiddler-reader"]


async def test_an_engine_closed_at_once_leaves_nothing(tiny: Path) -> None:
    for _ in range(3):
        async with Engine(tiny) as engine:
            waiting = engine.generate_stream(CHAT, greedy(4))
        with anyio.fail_after(30), pytest.raises(EngineClosedError):
            await waiting
    assert not [thread for thread in threading.enumerate() if thread.name == "fiddler-reader"]


async def test_requests_run_in_the_order_in_which_they_came(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 30.0)  # on a busy machine any reading may be slow
    monkeypatch.setattr(waiting, "QUEUE_PATIENCE_S", 30.0)
    prompts: list[Any] = ["a" * 400, CHAT, [5, 6, 7], "b", [{"role": "user", "content": "word " * 80}], [9]]
    async with opened(tiny, max_running=1, record=True) as engine:
        n_tokens = [await anyio.to_thread.run_sync(engine.count_tokens, prompt) for prompt in prompts]
        streams = [engine.generate_stream(prompt, greedy(2)) for prompt in prompts]
        for stream in streams:
            assert len([token async for token in stream]) == 2
        assert [recording.n_prompt for recording in engine.routing().recordings] == n_tokens


@pytest.mark.parametrize(
    "prompt",
    ["a" * 4_000_000, "😀" * 1_000_000, [{"role": "user", "content": "word " * 300_000}]],
    ids=["letters", "emoji", "chat"],
)
async def test_a_prompt_far_too_long_says_at_least_how_long(tiny: Path, prompt: Any) -> None:
    async with opened(tiny) as engine:
        with (
            anyio.fail_after(60),
            pytest.raises(PromptError, match=r"at least \d+ tokens .*context of 512") as caught,
        ):
            await engine.generate(prompt, greedy(2))
        assert int(str(caught.value).split("at least ")[1].split()[0]) > CONTEXT


@pytest.mark.parametrize(("n", "said"), [(CONTEXT, "512"), (CONTEXT + 1, "513"), (4_000_000, "4000000")])
async def test_token_ids_are_counted(tiny: Path, n: int, said: str) -> None:
    async with opened(tiny) as engine:
        with pytest.raises(PromptError, match=f"too long: {said} tokens leave no room within the context of 512"):
            await engine.generate([3] * n, greedy(2))


async def test_less_room_than_context_is_the_bound(tiny: Path) -> None:
    async with opened(tiny, kv_tokens=64) as engine:
        with pytest.raises(PromptError, match=r"tokens leave no room within kv_tokens=64; .* set kv_tokens higher"):
            await engine.generate("word " * 100_000, greedy(2))


async def test_a_thread_that_truncates_with_the_tokenizer_shortens_no_prompt(tiny: Path) -> None:
    prompt, ended = "a prompt of some length", threading.Event()

    async with opened(tiny) as engine:
        tokenizer: Any = engine.tokenizer

        def truncate() -> None:
            while not ended.is_set():
                tokenizer(["some text", "more of it"], truncation=True, max_length=3, padding=True)

        thread = threading.Thread(target=truncate)
        thread.start()
        try:
            for _ in range(60):
                result = await engine.generate(prompt, greedy(1))
                assert result.usage.prompt_tokens == len(prompt)
                assert engine.count_tokens(prompt) == len(prompt)
        finally:
            ended.set()
            thread.join()


async def test_a_special_token_stops_where_a_stop_string_names_it(tiny: Path) -> None:
    async with opened(tiny) as engine:
        free = await engine.generate("Hello", greedy(200))
        tokenizer: Any = engine.tokenizer
        special = [i for i, token in enumerate(free.token_ids) if token in tokenizer.all_special_ids]
        assert special, "the model makes none; take another seed"
        stop = tokenizer.convert_ids_to_tokens(free.token_ids[special[0]])
        stopped = await engine.generate("Hello", greedy(200), stop_strings=[stop])
    assert stopped.token_ids == free.token_ids[: special[0] + 1]
    assert stopped.finish_reason == "stop"
    assert free.text.startswith(stopped.text)


async def test_a_tokenizer_that_panics_ends_one_request(tiny: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "panics")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    bomb = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [bomb, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    async with opened(folder) as engine, engine.generate_stream("Hello", greedy(40)) as running:
        with pytest.raises(PromptError, match="the tokenizer refused the text"):
            await engine.generate("a" * 40 + "!", greedy(2))
        with pytest.raises(PromptError, match="the tokenizer refused the text"):
            engine.count_tokens("a" * 40 + "!")
        assert len([token async for token in running]) == 40


async def test_without_threads_the_error_is_typed_and_the_next_prompt_is_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(waiting, "Thread", NoThread)
        async with Engine(tiny) as engine:
            with anyio.fail_after(30), pytest.raises(EngineFailedError, match="no thread can be started"):
                await engine.generate("Hello", greedy(2))
            patch.undo()
            assert (await engine.generate("Hello", greedy(2))).usage.completion_tokens == 2
