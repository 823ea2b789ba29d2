"""A stream from its reader's side: closed while it is read, refused, used by two, moved to another loop."""

import gc
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
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
    FiddlerError,
    GenerationConfig,
    PromptError,
    TokenStream,
)
from fiddler.models import seam
from tests.support.covering import covering
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.anyio

FOREVER = 400
LONG = [5] * 100
WAIT_S = 60
"""Longest wait for what must happen; nothing is concluded from how long it took."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def engine(tiny: Path) -> AsyncIterator[Engine]:
    with anyio.fail_after(WAIT_S):
        async with Engine(tiny, EngineConfig(max_running=1, chunk_tokens=4)) as engine:
            yield engine


def greedy(n: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1)


async def queued(engine: Engine) -> tuple[TokenStream, Any]:
    """A request that waits for its turn, and what it waits for."""
    first = await engine.generate_stream([5], greedy(FOREVER))
    return engine.generate_stream([6], greedy(5)), first


async def prefilling(engine: Engine) -> tuple[TokenStream, Any]:
    return await engine.generate_stream(LONG, greedy(5)), None


async def decoding(engine: Engine) -> tuple[TokenStream, Any]:
    stream = engine.generate_stream([5], greedy(FOREVER))
    await anext(stream)
    return stream, None


async def outcome(wait: Awaitable[object]) -> str:
    """Return how a wait ended."""
    try:
        await wait
    except StopAsyncIteration:
        return "end"
    except FiddlerError as error:
        return type(error).__name__
    return "item"


async def until_read(stream: TokenStream) -> None:
    while stream._channel._wake is None:
        await anyio.sleep(0.001)


@pytest.mark.parametrize(
    ("state", "then", "anyio_backend"),
    covering([queued, prefilling, decoding], ["stream", "engine too"], ["asyncio", "trio"]),
)
async def test_closing_a_stream_wakes_who_waits_for_its_next_token(
    tiny: Path, state: Callable[[Engine], Awaitable[tuple[TokenStream, Any]]], then: str
) -> None:
    found: list[str] = []

    async def read(stream: TokenStream) -> None:
        while (ended := await outcome(anext(stream))) == "item":
            found.append(ended)
        found.append(ended)

    with anyio.fail_after(WAIT_S):
        async with Engine(tiny, EngineConfig(max_running=1, chunk_tokens=4)) as engine:
            stream, other = await state(engine)
            async with anyio.create_task_group() as group:
                group.start_soon(read, stream)
                await until_read(stream)
                await stream.aclose()
                if then == "engine too":
                    await engine.aclose()
            assert found[-1] == "end"
            assert await outcome(anext(stream)) == "end"
            await stream.aclose()
            del other


async def test_closing_a_stream_wakes_who_waits_for_its_admission(engine: Engine) -> None:
    stream, other = await queued(engine)
    found: list[str] = []

    async def wait() -> None:
        found.append(await outcome(stream))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await until_read(stream)
        await stream.aclose()
    assert found == ["EngineClosedError"]
    with pytest.raises(EngineClosedError, match="closed before its request was admitted"):
        await stream
    assert [token async for token in stream] == []
    assert len([token async for token in other]) == FOREVER


async def test_a_stream_that_was_admitted_and_closed_may_still_be_awaited(engine: Engine) -> None:
    stream = await engine.generate_stream([5], greedy(FOREVER))
    await anext(stream)
    await stream.aclose()
    assert await stream is stream
    assert [token async for token in stream] == []


async def test_a_refused_stream_says_so_each_time(engine: Engine) -> None:
    for prompt, message in (("", "empty"), ([10**6], "vocabulary"), (None, "text, token ids")):
        stream = engine.generate_stream(prompt)  # type: ignore[arg-type]
        seen: list[BaseException] = []
        for wait in (stream, anext(stream), stream, stream.__aenter__(), anext(stream)):
            with pytest.raises(PromptError, match=message) as caught:
                await wait
            seen.append(caught.value)
        await stream.aclose()
        with pytest.raises(PromptError, match=message):
            _ = [token async for token in stream]
        assert len({id(error) for error in seen}) == len(seen), "a traceback that grows holds every reader's frames"


async def test_a_failed_stream_says_so_each_time_with_its_cause(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: seam.Forward, call: seam.ExpertsCall) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(seam.Forward, "suspend", fail)
        stream = await engine.generate_stream([5], greedy(3))
        for _ in range(3):
            with pytest.raises(EngineFailedError, match="disk is gone") as caught:
                await anext(stream)
            assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(EngineFailedError, match="disk is gone"):
            await stream


async def test_a_second_reader_is_refused_and_the_first_goes_on(engine: Engine) -> None:
    stream, other = await queued(engine)
    n_read: list[int] = []

    async def read() -> None:
        n_read.append(len([token async for token in stream]))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await until_read(stream)
        with pytest.raises(anyio.BusyResourceError):
            await anext(stream)
        await other.aclose()
    assert n_read == [5]


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_a_stream_may_be_read_and_closed_in_another_loop(engine: Engine, other: str) -> None:
    async def elsewhere(work: Callable[[], Awaitable[Any]]) -> Any:
        return await anyio.to_thread.run_sync(lambda: anyio.run(work, backend=other))

    stream = engine.generate_stream([5], greedy(7))
    await anext(stream)

    async def rest() -> int:
        return len([token async for token in stream])

    assert await elsewhere(rest) == 6
    waiting, running = await queued(engine)
    found: list[str] = []

    async def read() -> None:
        found.append(await outcome(anext(waiting)))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await until_read(waiting)
        await elsewhere(waiting.aclose)
    assert found == ["end"]
    await running.aclose()


async def test_an_engine_stays_open_while_a_stream_of_it_is_held(tiny: Path) -> None:
    engine = Engine(tiny)
    await engine.__aenter__()
    stream = engine.generate_stream([5], greedy(30))
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    with anyio.fail_after(WAIT_S):
        assert len([token async for token in stream]) == 30
        gc.collect()
        assert gone() is None
        while any(thread.name == "fiddler-engine" for thread in threading.enumerate()):
            await anyio.sleep(0.005)
