"""What holds for the whole process belongs to the program: engines neither heed it nor change it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_tie_weights

import fiddler
from fiddler import Engine, EngineClosedError, EngineConfig
from fiddler.calibration.kernels import set_own_threads
from fiddler.models.alone import alone
from tests.support.default_dtype import default_dtype
from tests.support.tiny import save_tiny

CONFIG = EngineConfig(max_running=1)
"""One request after another: they are answered bit by bit alike, whoever comes first."""


CHOICES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": True, "seed": 1},
    {"seed": 2, "temperature": 1.7, "top_p": 0.95, "eta_cutoff": 0.001},
    {"seed": 3, "top_k": 50, "sequence_bias": [[[7], 0.3]]},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tied embeddings: transformers unties all models of the process while it loads one."""
    return save_tiny(tmp_path_factory.mktemp("state") / "tiny", tie_word_embeddings=True)


@pytest.fixture
def anyio_backend() -> str:
    """The caller's loop makes no difference to what the process looks like behind it."""
    return "asyncio"


async def answers(engine: Engine) -> list[Any]:
    """What a few requests at once are answered, with the logarithms of their probabilities: greedy, and drawn."""
    found: list[Any] = [None] * len(CHOICES)

    async def ask(i: int) -> None:
        result = await engine.generate([5 + i, *range(10, 30)], max_new_tokens=12, logprobs=True, **CHOICES[i])
        found[i] = result.token_ids, result.logprobs

    async with anyio.create_task_group() as group:
        for i in range(len(found)):
            group.start_soon(ask, i)
    return found


@contextmanager
def flipped_default_dtype() -> Generator[None]:
    """Another thread changes the default dtype all the time."""
    stop = threading.Event()

    def flip() -> None:
        while not stop.wait(0.0002):
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                torch.set_default_dtype(dtype)

    thread = threading.Thread(target=flip)
    with default_dtype(torch.float32):
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[Any]:
    async def run() -> list[Any]:
        async with Engine(tiny, CONFIG) as engine:
            return await answers(engine)

    return anyio.run(run)


@pytest.mark.anyio
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
async def test_the_default_dtype_does_not_matter(tiny: Path, expected: list[Any], dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        async with Engine(tiny, CONFIG) as engine:  # set before it was opened
            assert await answers(engine) == expected
            assert torch.get_default_dtype() == dtype
    async with Engine(tiny, CONFIG) as engine:
        with default_dtype(dtype):  # set once it was open
            assert await answers(engine) == expected


@pytest.mark.anyio
async def test_the_default_dtype_may_change_at_any_time(tiny: Path, expected: list[Any]) -> None:
    async with Engine(tiny, CONFIG) as engine:
        with flipped_default_dtype():
            for _ in range(3):
                assert await answers(engine) == expected


@pytest.mark.anyio
async def test_nor_does_the_default_device(tiny: Path, expected: list[Any]) -> None:
    prompt = torch.tensor([[5, *range(10, 30)]])
    unaffected = fiddler.attach(tiny, CONFIG)(prompt).logits
    torch.set_default_device("meta")
    try:
        async with Engine(tiny, CONFIG) as engine:
            assert await answers(engine) == expected
        with torch.inference_mode():
            attached = fiddler.attach(tiny, CONFIG)
        assert not any(p.is_inference() or p.is_meta for p in attached.parameters())
        assert torch.equal(attached(prompt).logits, unaffected)
    finally:
        torch.set_default_device(None)


@pytest.mark.anyio
async def test_answers_are_the_same_while_other_engines_open(tiny: Path, expected: list[Any]) -> None:
    """Opening changes the default dtype, which transformers makes that of the checkpoint."""
    half = EngineConfig(dtype="bfloat16")
    async with Engine(tiny, CONFIG) as engine, anyio.create_task_group() as group:

        async def open_others() -> None:
            for _ in range(4):
                async with Engine(tiny, half):
                    pass
            group.cancel_scope.cancel()

        group.start_soon(open_others)
        while True:
            assert await answers(engine) == expected


@pytest.mark.anyio
async def test_engines_may_be_opened_at_once(tiny: Path, expected: list[Any]) -> None:
    found: list[Any] = []

    async def run() -> None:
        async with Engine(tiny, CONFIG) as engine:
            found.append(await answers(engine))

    def attach() -> None:
        found.append(expected if fiddler.attach(tiny).lm_head.weight.numel() else None)

    for _ in range(2):
        with anyio.fail_after(120):
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(run)
                group.start_soon(anyio.to_thread.run_sync, attach)
    assert found == [expected] * 10
    assert torch.get_default_dtype() == torch.float32
    AutoModelForCausalLM.from_pretrained(tiny)  # transformers is as it was


@pytest.fixture
def held() -> Generator[threading.Event]:
    """Another thread loads until this is set; meanwhile the process is as transformers has it while it loads."""
    holds, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with alone(), default_dtype(torch.bfloat16), no_tie_weights():
            holds.set()
            let_go.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    holds.wait(60)
    yield let_go
    let_go.set()
    holder.join()


@pytest.mark.anyio
async def test_opening_that_is_cancelled_while_it_waits_for_its_turn_loads_nothing(
    tiny: Path, expected: list[Any], held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    read = AutoConfig.from_pretrained
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda *args, **kw: (loads.append(args), read(*args, **kw))[1]
    )
    cancelled, closed = Engine(tiny, CONFIG), Engine(tiny, CONFIG)
    with anyio.move_on_after(0.2) as scope:
        async with cancelled:
            pass
    assert scope.cancelled_caught

    async def open_and_be_closed() -> None:
        with pytest.raises(EngineClosedError, match="closed while it was opened"):
            await closed.__aenter__()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(open_and_be_closed)
            await anyio.sleep(0.1)
            group.start_soon(closed.aclose)
            await anyio.sleep(0.1)
            held.set()
        await cancelled.aclose()
        assert not loads
        async with Engine(tiny, CONFIG) as engine:
            assert await answers(engine) == expected
    assert loads


def before() -> list[Any]:
    """What transformers changes while it loads."""
    return [torch.get_default_dtype(), torch.linspace, torch.nn.init.normal_, PreTrainedModel.tie_weights]


def test_models_of_the_program_wait_while_ours_are_loaded(tiny: Path, held: threading.Event) -> None:
    found: list[Any] = []

    def load() -> None:
        found.append(AutoModelForCausalLM.from_pretrained(tiny))
        found.append(AutoModelForCausalLM.from_config(found[0].config))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join(0.5)
    assert not found
    held.set()
    thread.join(60)
    for model in found:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.anyio
async def test_models_of_the_program_and_engines_may_load_at_once(tiny: Path, expected: list[Any]) -> None:
    first, stop = before(), threading.Event()

    def load() -> None:
        while not stop.is_set():
            model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float16)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert {p.dtype for p in model.parameters()} == {torch.float16}

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(anyio.to_thread.run_sync, load)
        for _ in range(3):
            async with Engine(tiny, CONFIG) as engine:
                assert await answers(engine) == expected
        stop.set()
    assert before() == first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_ours_are_loaded_can_load(tiny: Path, held: threading.Event) -> None:
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            torch.set_num_threads(1)  # the threads of torch's pool are the parent's
            model = AutoModelForCausalLM.from_pretrained(tiny)
            tied = model.lm_head.weight is model.model.embed_tokens.weight
            os._exit(0 if tied and torch.zeros(1).dtype == torch.float32 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_thread_has_a_thread_count_of_its_own() -> None:
    def in_thread(n: int | None) -> int:
        found: list[int] = []

        def work() -> None:
            if n is not None:
                set_own_threads(n)
            torch.ones(300, 300) @ torch.ones(300, 300)
            found.append(torch.get_num_threads())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]

    mine, others = torch.get_num_threads(), in_thread(None)
    assert in_thread(others + 4) == others + 4
    assert (torch.get_num_threads(), in_thread(None)) == (mine, others)


def test_nothing_of_the_process_changes(tiny: Path) -> None:
    command = [sys.executable, "-m", "tests.support.watched", str(tiny)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "LOAD REPORT" not in done.stderr
    assert "Loading weights" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["n"] > 3
    assert found["meanwhile"] == []
    assert found["changes"] == [[], [], []]
