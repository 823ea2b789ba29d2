"""Engines in processes that end in any way, fork, or have no file descriptors: never a hang, never an abort."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import save_tiny

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked: imports take seconds")

WAIT_S = 120
"""Longest wait for a process; nothing is concluded from how long it took."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(script: str, *arguments: object) -> Any:
    """Run a script in a process of its own; returns what its last line says."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EXITS = """
import json, os, signal, sys
import anyio, fiddler.engine.engine
import transformers.models.qwen3_moe.modeling_qwen3_moe  # once, and not in each child
from fiddler import Engine, EngineConfig, GenerationConfig

kept = []

async def program(how, device):
    engine = Engine(sys.argv[1], EngineConfig(device=device, kernels="linear"))
    if how == "opening":
        with anyio.move_on_after(0.01):
            await engine.__aenter__()
        return
    if how == "in a block":
        async with engine:
            await asked(engine, how)
    await engine.__aenter__()
    await asked(engine, how)
    kept.append(engine)

async def asked(engine, how):
    options = GenerationConfig(max_new_tokens=400, do_sample=False, eos_token_id=-1)
    streams = [engine.generate_stream([5] * 50, options) for _ in range(8)]
    kept.extend(streams)
    async for token in streams[0]:
        if how == "raise":
            raise ValueError("the program's own")
        if how in ("exit", "in a block"):
            sys.exit(3)
        break

children = {}
for how, device, backend in json.loads(sys.argv[2]):
    if (child := os.fork()) == 0:
        signal.alarm(100)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        anyio.run(program, how, device, backend=backend)
        sys.exit()
    children[how + device] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(children))
"""


def test_a_program_may_end_in_any_way(tiny: Path) -> None:
    codes = {"return": 0, "exit": 3, "in a block": 3, "raise": 1, "opening": 0}
    ways = [(how, "cpu", "asyncio") for how in codes] + [
        (how, "sim", "trio") for how in ("return", "exit", "opening")
    ]
    found = run(EXITS, tiny, json.dumps(ways))
    assert found == {how + device: codes[how] for how, device, _ in ways}


FORK = """
import json, os, signal, sys
import anyio
from fiddler import Engine, EngineConfig, FiddlerError, GenerationConfig

async def told(engine, streams):
    asked = [lambda: engine.generate_stream([5]), lambda: engine.max_context, lambda: engine.count_tokens("a"),
             engine.statistics, engine.trace, engine.routing, lambda: engine.tokenizer]
    waited = [lambda: streams[0], lambda: anext(streams[0]), lambda: streams[1], engine.__aenter__,
              lambda: engine.generate([5])]
    found = []
    for ask in asked + waited:
        try:
            answer = ask()
            if ask in waited:
                await answer
            found.append("nothing")
        except FiddlerError as error:
            found.append(type(error).__name__)
    await streams[0].aclose()
    await engine.aclose()
    return found

async def opened():
    engine = Engine(sys.argv[1], EngineConfig(device="sim", kernels="linear", record=True, trace=True))
    await engine.__aenter__()
    options = GenerationConfig(max_new_tokens=300, do_sample=False, eos_token_id=-1)
    streams = [engine.generate_stream([5], options) for _ in range(2)]
    await anext(streams[0])
    return engine, streams

async def rest(engine, streams):
    found = [len([token async for token in stream]) for stream in streams]
    await engine.aclose()
    return found

engine, streams = anyio.run(opened)
children = []
for backend in ("asyncio", "trio"):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(60)
        found = anyio.run(told, engine, streams, backend=backend)
        del engine, streams
        os.write(writing, json.dumps(found).encode())
        sys.exit()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        children.append([json.loads(pipe.read()), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])])
print(json.dumps({"children": children, "parent": anyio.run(rest, engine, streams)}))
"""


def test_a_forked_child_is_told_that_the_engine_is_its_parents(tiny: Path) -> None:
    found = run(FORK, tiny)
    assert found["children"] == [[["EngineClosedError"] * 12, 0]] * 2
    assert found["parent"] == [299, 300], "what a child did is no business of its parent's"


DESCRIPTORS = """
import json, os, resource, sys
import anyio
from fiddler import Engine, EngineConfig, FiddlerError

async def attempt(device):
    try:
        with anyio.fail_after(60):
            async with Engine(sys.argv[1], EngineConfig(device=device, kernels="linear")) as engine:
                await engine.generate([5], max_new_tokens=2)
        return "works"
    except FiddlerError as error:
        return type(error).__name__

async def main(device):
    found = [await attempt(device)]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    while taken:
        found.append(await attempt(device))
        os.close(taken.pop())
    print(json.dumps(found))

anyio.run(main, sys.argv[2], backend=sys.argv[3])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="descriptors are counted as Linux shows them")
@pytest.mark.parametrize(("device", "backend"), [("cpu", "trio"), ("sim", "asyncio")])
def test_without_descriptors_opening_fails_or_works(tiny: Path, device: str, backend: str) -> None:
    first, *others, last = run(DESCRIPTORS, tiny, device, backend)
    assert first == last == "works"
    assert others[0] == "EngineFailedError"
    assert set(others) <= {"works", "EngineFailedError", "CheckpointError", "ModelError"}


CLOSED = """
import json, os, signal, sys
import anyio, fiddler.engine.engine
import transformers.models.qwen3_moe.modeling_qwen3_moe  # once, and not in each child
from fiddler import Engine, EngineConfig

async def main(streams):
    for stream in map(int, streams):
        os.close(stream)
    async with Engine(sys.argv[1], EngineConfig(kernels="linear")) as engine:
        return await engine.generate("Once", max_new_tokens=2)

found = []
for streams in sys.argv[2:]:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(100)
        os.write(writing, b"%d" % len(anyio.run(main, streams).token_ids))
        os._exit(0)  # the interpreter writes out its streams
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        found.append(pipe.read())
print(json.dumps(found))
"""


def test_a_program_may_lack_standard_streams(tiny: Path) -> None:
    assert run(CLOSED, tiny, "0", "1", "012") == ["2"] * 3
