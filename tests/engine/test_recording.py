"""Routing as an engine records it: what the model's routers said, once a token, whoever shared its steps."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from fiddler import ConfigError, Engine, EngineConfig, EngineFailedError, GenerationConfig, PromptError
from fiddler.engine import assembly as rigs
from fiddler.models import loaded as loading
from fiddler.models.seam import find_experts
from fiddler.recording import Recording
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.messages import Event, LayerDone, LayerReady
from fiddler.steps.recorder import Recorder
from fiddler.steps.wave import ModelWave
from tests.support.tiny import N_EXPERTS, N_LAYERS, TOP_K, save_tiny

pytestmark = pytest.mark.anyio

PROMPTS = ([5, 6, 7], list(range(40, 77)), [9], list(range(100, 120)))
N_NEW = 6
VIRTUAL = "sim:rtx4090-desktop"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def anyio_backend() -> str:
    """The caller's loop makes no difference to what is recorded behind it."""
    return "asyncio"


def greedy(n: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1)


@asynccontextmanager
async def opened(model: Path, **options: Any) -> AsyncIterator[Engine]:
    config = {"kernels": "linear", "record": True, "chunk_tokens": 8, **options}
    with anyio.fail_after(60):
        async with Engine(model, EngineConfig(**config)) as engine:
            yield engine


async def ran(engine: Engine, prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    """Run prompts side by side; returns each one's tokens that were run, the prompt's among them."""
    streams = [engine.generate_stream(prompt, greedy(N_NEW)) for prompt in prompts]
    made = [[token.id async for token in stream] for stream in streams]
    return [[*prompt, *ids[:-1]] for prompt, ids in zip(prompts, made, strict=True)]


Layers = list[dict[str, NDArray[Any]]]


def hooked(folder: Path, ids: list[int]) -> Layers:
    """What plain transformers hands to each layer's experts: `hidden` [T, H], `index` and `weights` [T, K]."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: Layers = []

    def note(_module: Any, args: Sequence[torch.Tensor]) -> None:
        seen.append(dict(zip(("hidden", "index", "weights"), (a.detach().clone() for a in args), strict=True)))  # type: ignore[arg-type]

    for module in find_experts(model).values():
        module.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(torch.tensor([ids]))
    return seen


def matches(recording: Recording, layers: Layers, *, n: int | None = None) -> None:
    """Assert that a recording is what the first `n` tokens of a plain forward did, or all of them."""
    assert recording.weights is not None
    assert recording.experts.shape[1] == recording.weights.shape[1] == len(layers)
    for layer, seen in enumerate(layers):
        np.testing.assert_array_equal(recording.experts[:, layer], seen["index"][:n])
        np.testing.assert_allclose(recording.weights[:, layer], seen["weights"][:n], atol=1e-3)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
async def test_it_is_what_the_routers_said(
    kind: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path, kind)
    if not packed:
        monkeypatch.setattr(loading, "PACKED", frozenset())
    async with opened(folder) as engine:
        sequences = await ran(engine)
        trace = engine.routing()

    assert trace.n_experts == (N_EXPERTS,) * N_LAYERS
    assert [r.name for r in trace.recordings] == ["0", "1", "2", "3"]
    for recording, prompt, ids in zip(trace.recordings, PROMPTS, sequences, strict=True):
        assert recording.n_prompt == len(prompt)
        assert len(recording.experts) == len(prompt) + N_NEW - 1  # the last token is not run
        matches(recording, hooked(folder, ids))


@pytest.mark.parametrize("device", ["sim", VIRTUAL])
@pytest.mark.parametrize("waves", ["one", "two"])
async def test_it_is_the_same_on_any_device_and_in_two_waves(tiny: Path, device: str, waves: Any) -> None:
    options = {"device": device, "waves": waves, "slots": 4, "planner": "all-fetch"}
    async with opened(tiny, **options) as engine:
        sequences = await ran(engine)
        trace = engine.routing()

    for recording, ids in zip(trace.recordings, sequences, strict=True):
        matches(recording, hooked(tiny, ids))


async def test_deferred_visits_are_recorded_where_they_were_routed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, num_experts_per_tok=6)
    async with opened(folder, defer=3) as engine:
        sequences = await ran(engine)
        trace = engine.routing()

    for recording, ids in zip(trace.recordings, sequences, strict=True):
        assert recording.experts.shape == (len(ids), N_LAYERS, 6)
        assert all(len(set(visited)) == 6 for visited in recording.experts.reshape(-1, 6).tolist())
        matches(
            Recording("", 0, recording.experts[:, :1], _first(recording.weights)), hooked(folder, ids)[:1]
        )  # the layers after it see another past


def _first(weights: NDArray[np.float16] | None) -> NDArray[np.float16]:
    assert weights is not None
    return weights[:, :1]


async def test_a_request_that_is_left_has_the_steps_that_were_run(tiny: Path) -> None:
    async with opened(tiny) as engine:
        async with engine.generate_stream(PROMPTS[1], greedy(300)) as stream:
            made = [(await anext(stream)).id for _ in range(4)]
        await engine.generate(PROMPTS[0], greedy(2))
        left, whole = engine.routing().recordings

    assert len(left.experts) >= len(PROMPTS[1]) + 3
    n = len(PROMPTS[1]) + 3
    matches(Recording("", 0, left.experts[:n], left.weights[:n]), hooked(tiny, [*PROMPTS[1], *made[:3]]))  # type: ignore[index]
    assert len(whole.experts) == len(PROMPTS[0]) + 1


async def test_a_step_that_fails_leaves_nothing_behind(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, n_taken = ModelWave.take, 0

    def break_third_step(wave: ModelWave, done: LayerDone) -> None:
        nonlocal n_taken
        n_taken += 1
        if n_taken == 2 * N_LAYERS + 2:
            raise RuntimeError("broken")
        take(wave, done)

    monkeypatch.setattr(ModelWave, "take", break_third_step)
    async with opened(tiny) as engine:
        with pytest.raises(EngineFailedError):
            await engine.generate(PROMPTS[1], greedy(2))
        (ids,) = await ran(engine, PROMPTS[1:2])
        broken, whole = engine.routing().recordings

    assert (len(broken.experts), broken.n_prompt) == (16, 16)
    matches(broken, hooked(tiny, ids), n=16)
    matches(whole, hooked(tiny, ids))


async def test_half_a_step_that_fails_leaves_nothing_behind(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = ModelWave.take

    def break_second_half(wave: ModelWave, done: LayerDone) -> None:
        if done.wave == 1 and done.layer == N_LAYERS - 1:
            raise RuntimeError("broken")
        take(wave, done)

    monkeypatch.setattr(ModelWave, "take", break_second_half)
    async with opened(tiny, waves="two", device=VIRTUAL) as engine:
        with pytest.raises(EngineFailedError):
            await engine.generate(PROMPTS[1], greedy(2))
        assert engine.routing().recordings == ()


async def test_what_was_taken_does_not_change(tiny: Path) -> None:
    async with opened(tiny) as engine:
        assert engine.routing().recordings == ()
        with pytest.raises(PromptError):
            await engine.generate([], greedy(2))
        async with engine.generate_stream(PROMPTS[0], greedy(8)) as stream:
            await anext(stream)
            early = engine.routing()
            n_early = len(early.recordings[0].experts)
            assert n_early >= len(PROMPTS[0])
            assert [token async for token in stream]
        late = engine.routing()
    assert len(early.recordings[0].experts) == n_early < len(late.recordings[0].experts) == len(PROMPTS[0]) + 7
    with pytest.raises(ValueError, match="read-only"):
        early.recordings[0].experts[0] = 0
    assert len(engine.routing().recordings) == 1
    assert engine.routing().model == tiny.name


async def test_off_it_costs_nothing_and_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigs, "Recorder", None)
    monkeypatch.setattr("fiddler.models.lookahead.Lookahead", None)
    for options in ({}, {"device": VIRTUAL, "prefetch": "off"}):
        async with opened(tiny, record=False, **options) as engine:
            await engine.generate(PROMPTS[0], greedy(2))
            with pytest.raises(ConfigError, match="record=True"):
                engine.routing()
    with pytest.raises(ConfigError, match="record=True"):
        Engine(tiny, EngineConfig(record=True)).routing()


async def test_what_a_look_ahead_expected_is_beside_what_came(tiny: Path) -> None:
    gates = [layer.mlp.gate for layer in AutoModelForCausalLM.from_pretrained(tiny).model.layers]
    async with opened(tiny) as engine:
        sequences = await ran(engine)
        trace = engine.routing()

    for recording, ids in zip(trace.recordings, sequences, strict=True):
        assert recording.ahead is not None
        assert recording.ahead.shape == recording.experts.shape
        assert (recording.ahead[:, 0] == -1).all()
        for layer, seen in enumerate(hooked(tiny, ids)[:-1]):
            with torch.inference_mode():
                *_, index = gates[layer + 1](seen["hidden"])
            np.testing.assert_array_equal(recording.ahead[:, layer + 1], index)


async def test_the_scheduler_hears_what_is_expected(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, heard = Scheduler.handle, []

    def listen(scheduler: Scheduler, event: Event, now_s: float) -> Any:
        if isinstance(event, LayerReady):
            heard.append(event.layer)
        return handle(scheduler, event, now_s)

    monkeypatch.setattr(Scheduler, "handle", listen)
    async with opened(tiny, record=False, device=VIRTUAL) as engine:
        await engine.generate(PROMPTS[1], greedy(2))

    assert len(heard) == 6 * N_LAYERS
    for ready in heard:
        rows = [n for _, n in ready.ahead]
        assert sum(rows) == (0 if ready.index == N_LAYERS - 1 else ready.n_tokens * TOP_K)
        assert rows == sorted(rows, reverse=True)


def call(index: list[list[int]], weights: list[list[float]] | None = None) -> tuple[Tensor, Tensor]:
    asked = torch.tensor(index)
    given = torch.ones(asked.shape) if weights is None else torch.tensor(weights)
    return asked, given.to(torch.bfloat16)


def test_layers_may_differ_and_be_passed_by_some_forwards_only() -> None:
    recorder = Recorder((4, 2))
    wave = recorder.wave([1, 2])
    wave.visit(0, *call([[3, 0, 1]]), [0])
    wave.visit(0, *call([[2, 1, 0], [1, 4, -1]], [[0.5, 0.5, 0.0], [1.0, 1.0, 1.0]]), [1])
    wave.expect(1, torch.tensor([[1], [2]]), [1])
    wave.visit(1, *call([[1], [0]]), [1])
    record = recorder.open(3)
    record.parts.append(wave.rows())
    found = recorder.trace("two layers").recordings[0]

    visited = [[[3, 0, 1], [-1, -1, -1]], [[2, 1, -1], [1, -1, -1]], [[1, -1, -1], [0, -1, -1]]]
    assert found.experts.tolist() == visited
    assert found.weights is not None
    assert found.weights[1].tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert found.ahead is not None
    assert found.ahead[:, 1, 0].tolist() == [-1, 1, -1]
    assert (found.ahead[:, 0] == -1).all()


def test_without_a_look_ahead_there_is_nothing_expected() -> None:
    recorder = Recorder((4,))
    for index in ([[3, 0]], [[1, 2, 3]]):
        wave = recorder.wave([1])
        wave.visit(0, *call(index), [0])
        recorder.open(1).parts.append(wave.rows())
    recorder.open(7)
    narrow, wide = recorder.trace("one layer").recordings

    assert narrow.ahead is wide.ahead is None
    assert (narrow.experts.tolist(), wide.experts.tolist()) == ([[[3, 0, -1]]], [[[1, 2, 3]]])
