"""However an engine ends, everybody who waits on it is told, and nothing of it is left."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio import lowlevel
from greenlet import GreenletExit

from fiddler import (
    DEMO,
    CheckpointError,
    ConfigError,
    Engine,
    EngineClosedError,
    EngineConfig,
    EngineFailedError,
    GenerationConfig,
    PromptError,
    TokenStream,
    attach,
)
from fiddler.devices.cpu import CpuDevice
from fiddler.engine.loop import EngineLoop
from fiddler.models import seam
from fiddler.text.tokenizer import Decoder, Text
from tests.support.covering import covering
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.anyio

FOREVER = 400
WAIT_S = 60
"""Longest wait for what must happen; nothing is concluded from how long it took."""


class Panic(BaseException):
    """As a tokenizer's, which is written in Rust: no `Exception`."""


BACKENDS = ("asyncio", "trio")
ERRORS = [Panic("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), GreenletExit(), MemoryError()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def greedy(n: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fiddler-")]


async def until_gone() -> None:
    while engine_threads():
        await anyio.sleep(0.005)


# An error that is no `Exception`


PLACES: tuple[tuple[str, type, str], ...] = (
    ("cpu", Text, "read"),
    ("cpu", Decoder, "push"),
    ("cpu", seam.Forward, "suspend"),
    ("cpu", CpuDevice, "run"),
    ("sim", CpuDevice, "run"),
)
"""A device, and what raises on it."""


@pytest.mark.parametrize(
    ("place", "error", "anyio_backend"),
    covering(PLACES, ERRORS, BACKENDS),
    ids=lambda value: f"{value[0]}-{value[2]}" if isinstance(value, tuple) else str(value) or repr(value),
)
async def test_what_one_request_raises_ends_that_request_alone(
    tiny: Path, place: tuple[str, type, str], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, *where = place
    with anyio.fail_after(WAIT_S):
        async with Engine(tiny, EngineConfig(device=device, kernels="linear")) as engine:
            expected = (await engine.generate([5], greedy(4))).token_ids
            with monkeypatch.context() as patch:
                patch.setattr(*where, raising(error))
                told = PromptError if where == [Text, "read"] else EngineFailedError
                with pytest.raises(told) as caught:
                    await engine.generate([5], greedy(4))
            assert caught.value.__cause__ is error
            assert type(error).__name__ in str(caught.value)
            assert (await engine.generate([5], greedy(4))).token_ids == expected


@pytest.mark.parametrize(
    ("where", "error"),
    [("_turn", error) for error in [*ERRORS, RuntimeError("broken")]]
    + [("_publish", SystemExit(3)), ("_step", Panic("no"))],
    ids=str,
)
async def test_what_ends_the_engine_is_told_to_everybody(
    tiny: Path, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with anyio.fail_after(WAIT_S):
        async with Engine(tiny, EngineConfig(max_running=1)) as engine:
            running = await engine.generate_stream([5], greedy(FOREVER))
            waiting = engine.generate_stream([6], greedy(3))
            monkeypatch.setattr(EngineLoop, where, raising(error))
            for stream in (running, waiting):
                with pytest.raises(EngineFailedError, match=type(error).__name__) as caught:
                    _ = [token async for token in stream]
                assert caught.value.__cause__ is error
            for ask in (
                lambda: engine.generate_stream([5]),
                lambda: engine.max_context,
                lambda: engine.count_tokens([5]),
            ):
                with pytest.raises(EngineFailedError, match=type(error).__name__) as caught:
                    await until_told(ask)
                assert caught.value.__cause__ is error
            assert engine.statistics().n_running == 0 or where == "_publish"
            await engine.aclose()
            with pytest.raises(EngineFailedError):
                engine.generate_stream([5])
            await until_gone()


async def until_told(ask: Callable[[], Any]) -> None:
    """Ask until the engine's thread is through with its end; what a stream has to say is in its first item."""
    while True:
        answer = ask()
        if isinstance(answer, TokenStream):
            await anext(answer)
        await lowlevel.checkpoint()


async def test_who_submits_while_the_engine_ends_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes after the last look into the inbox must not wait for ever."""
    publish = EngineLoop._publish
    sealed, pushed = threading.Event(), threading.Event()

    def slow(self: EngineLoop) -> None:
        publish(self)
        if self._closing:
            sealed.set()
            pushed.wait(WAIT_S)

    monkeypatch.setattr(EngineLoop, "_publish", slow)
    with anyio.fail_after(WAIT_S):
        async with Engine(tiny) as engine:
            assert engine._thread is not None
            engine._thread.close()  # while the engine believes that it is open
            await anyio.to_thread.run_sync(sealed.wait, WAIT_S)
            stream = engine.generate_stream([5], greedy(3))
            pushed.set()
            with pytest.raises(EngineClosedError, match="in flight"):
                await stream


@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_what_a_loader_raises_does_not_end_the_program(error: BaseException) -> None:
    engine = Engine(raising(error))
    expected: type[BaseException] = type(error) if isinstance(error, Exception) else EngineFailedError
    with anyio.fail_after(WAIT_S), pytest.raises(expected) as caught:
        await engine.__aenter__()
    assert error in (caught.value, caught.value.__cause__)
    assert engine_threads() == []
    await engine.aclose()


async def test_a_preload_that_fails_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Panic("no")

    monkeypatch.setattr("fiddler.lanes.runner.Runner.preload", fail)
    with anyio.fail_after(WAIT_S), pytest.raises(EngineFailedError, match="Panic: no"):
        async with Engine(tiny) as engine:
            await engine.generate([5], greedy(3))


# No thread to be had


@pytest.mark.parametrize("left", range(4))
async def test_without_threads_opening_fails_and_leaves_none(
    tiny: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, [0]

    def limited(self: threading.Thread) -> None:
        if self.name.startswith("fiddler-") and self.name != "fiddler-measure":
            started[0] += 1
            if started[0] > left:
                raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with anyio.fail_after(WAIT_S):
        with pytest.raises(EngineFailedError, match="could not be started: can't start new thread"):
            await Engine(tiny, EngineConfig(device="sim", kernels="linear")).__aenter__()
        await until_gone()


# Nobody holds it


@pytest.mark.parametrize(
    ("device", "ending", "anyio_backend"), covering(["cpu", "sim"], ["dropped", "closed"], BACKENDS)
)
async def test_an_engine_that_nobody_holds_gives_its_thread_and_memory_back(
    tiny: Path, device: str, ending: str
) -> None:
    async def opened() -> tuple[Engine, weakref.ref[Any]]:
        engine = Engine(tiny, EngineConfig(device=device, kernels="linear"))
        await engine.__aenter__()
        await engine.generate([5], greedy(3))
        assert engine._loaded is not None
        return engine, weakref.ref(engine._loaded.model)

    with anyio.fail_after(WAIT_S):
        engine, first = await opened()
        n_threads = len(engine_threads())
        if ending == "closed":
            await engine.aclose()
            gc.collect()
            assert first() is None, "a closed engine keeps its statistics, and no model"
            assert engine.statistics().n_finished == 1
            return
        engine, second = await opened()
        gc.collect()
        while len(engine_threads()) > n_threads or first() is not None:
            await anyio.sleep(0.005)
            gc.collect()
        assert second() is not None
        assert (await engine.generate([5], greedy(3))).usage.completion_tokens == 3
        await engine.aclose()


async def test_an_engine_whose_opening_was_cancelled_ends(tiny: Path) -> None:
    with anyio.fail_after(WAIT_S):
        engine = Engine(tiny)
        with anyio.move_on_after(0):
            await engine.__aenter__()
        with pytest.raises(EngineClosedError):
            engine.generate_stream([5])
        await engine.aclose()
        assert engine_threads() == []


async def test_all_who_close_an_engine_wait_for_its_end(tiny: Path) -> None:
    with anyio.fail_after(WAIT_S):
        async with Engine(tiny) as engine:
            await engine.generate_stream([5], greedy(FOREVER))

            async def close() -> None:
                await engine.aclose()
                assert engine_threads() == []

            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(close)


# Opened with something else


class Odd:
    """An object of a caller's whose methods raise."""

    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")

    def __fspath__(self) -> str:
        raise RuntimeError("not to be found")


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ("cpu", r"EngineConfig\(device='cpu'\)"),
        ({"device": "cpu"}, "EngineConfig.from_mapping"),
        (3, r"EngineConfig\(\.\.\.\)"),
        (GenerationConfig(), "EngineConfig"),
        (EngineConfig, "EngineConfig"),
        (Odd(), "<Odd>; write EngineConfig"),
    ],
    ids=["str", "dict", "int", "GenerationConfig", "type", "Odd"],
)
@pytest.mark.parametrize("opens", [Engine, attach])
def test_options_are_an_engine_config(opens: Callable[..., Any], config: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        opens(DEMO, config)


@pytest.mark.parametrize("model", [123, None, b"demo", ["a"], EngineConfig(), Engine, Odd()], ids=type)
def test_a_model_is_a_folder_an_id_or_a_function(model: Any) -> None:
    due = r"neither a checkpoint folder, a GGUF file, a hub id .* nor a function"
    with pytest.raises(CheckpointError, match=due):
        Engine(model)


def test_a_loaded_model_is_for_attach(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fiddler\.attach"):
        Engine(attach(tiny))  # type: ignore[arg-type]


async def test_a_folder_may_be_any_path(tiny: Path) -> None:
    class Elsewhere:
        def __fspath__(self) -> str:
            return str(tiny)

    async with Engine(Elsewhere()) as engine:  # type: ignore[arg-type]
        assert engine.count_tokens([5]) == 1
