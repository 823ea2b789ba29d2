"""Models made in memory: random experts that differ, routing that is the recording's, on every device."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from bench import machine
from bench.synthetic.memory import in_memory, loader
from bench.synthetic.replayed import Replay, drawn, recorded
from bench.synthetic.shapes import SHAPES, Shape, shape
from fiddler import ConfigError, Engine, EngineConfig
from fiddler.gpu import cuda
from fiddler.lab.shape import ModelShape
from fiddler.models.loaded import ServableModel, load
from fiddler.recording import RoutingTrace
from fiddler.steps import graphs
from fiddler.store.blocks import BlockStore
from tests.support.fake_gpu import FakeGpu
from tools import synthesize

PUBLISHED = ("mixtral-8x7b", "qwen3-30b-a3b")
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "initializer_range": 0.15,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "vocab_size": 320,
}
PROMPTS = ([5, 6, 7], list(range(40, 77)), [9, 10], list(range(100, 120)))
N_NEW = 6


def small(name: str, n_layers: int = 3) -> Shape:
    """A published shape with everything small but the number of experts a token visits."""
    cut = shape(f"{name}:layers={n_layers}")
    sizes = {key: value for key, value in SMALL.items() if key in cut.config}
    return replace(cut, config={**cut.config, **sizes})


def made(of: Shape, **options: Any) -> ServableModel:
    return in_memory(of, EngineConfig(**options))


def store_of(loaded: ServableModel) -> BlockStore:
    assert isinstance(loaded.store, BlockStore)
    return loaded.store


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_those_that_ship_with_fiddler(name: str) -> None:
    assert shape(name).sizes == ModelShape.load(name)


@pytest.mark.parametrize("name", SHAPES)
def test_as_many_layers_as_are_asked_for(name: str) -> None:
    cut = shape(f"{name}:layers=2")
    config = cut.pretrained()
    assert config.num_hidden_layers == cut.sizes.n_layers == 2
    assert cut.config["vocab_size"] < SHAPES[name].config["vocab_size"]
    assert shape(f"{name}:layers={SHAPES[name].sizes.n_layers}").config == SHAPES[name].config


@pytest.mark.parametrize("spec", ["gpt-5", "tiny:layers=0", "tiny:experts=2", "tiny:layers=7"])
def test_a_shape_that_there_is_not(spec: str) -> None:
    with pytest.raises(ValueError, match=r"NAME\[:layers=N\]|tiny has 6 layers"):
        shape(spec)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_experts_are_finite_and_differ_in_every_row(name: str, dtype: Any) -> None:
    loaded = made(small(name), dtype=dtype)
    store, rows = store_of(loaded), set[bytes]()
    assert loaded.n_experts == (small(name).sizes.n_experts,) * 3
    for layer, n in enumerate(loaded.n_experts):
        for expert in range(n):
            weights = store.weights(layer, expert)
            assert all(part.isfinite().all() for part in weights.parts)
            assert 0.1 < weights.down.float().std() < 0.2
            rows |= {row.numpy().tobytes() for row in weights.down.float()}
    assert len(rows) == sum(loaded.n_experts) * weights.down.shape[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_blocks_are_laid_out_as_those_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    own = small(name)
    folder = synthesize.write(dict(own.config), tmp_path / name)
    loaded, of_checkpoint = made(own), load(folder, EngineConfig(store="packed"))
    assert [store_of(loaded).layout(i) for i in range(3)] == [store_of(of_checkpoint).layout(i) for i in range(3)]
    assert (loaded.n_experts, loaded.top_k) == (of_checkpoint.n_experts, of_checkpoint.top_k)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_dense_part_is_initialised_as_transformers_does(name: str) -> None:
    loaded, again = made(small(name)), made(small(name))
    whole = AutoModelForCausalLM.from_config(small(name).pretrained())
    parameters, buffers = dict(loaded.model.named_parameters()), dict(loaded.model.named_buffers())
    assert parameters.keys() == {path for path, _ in whole.named_parameters() if ".experts." not in path}
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for path, tensor in parameters.items():
        assert (tensor == 1.0).all() if "norm" in path else tensor.float().std() < 0.3, path
        assert (tensor.dtype, tensor.requires_grad) == (torch.bfloat16, False)
        assert torch.equal(tensor, dict(again.model.named_parameters())[path])
    for path, table in whole.named_buffers():
        assert torch.equal(buffers[path], table), path


def test_a_model_that_does_not_fit_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda: 24 << 30)
    whole = r"qwen3-30b-a3b takes 6\d\.\d GB of memory \(58\.0 of experts, 0\.0 of slots\), 2\.1 must stay"
    with pytest.raises(ConfigError, match=whole + ".*qwen3-30b-a3b:layers=N"):
        made(shape("qwen3-30b-a3b"))
    with pytest.raises(ConfigError, match=r"14\.5 of slots\)"):  # of a simulated accelerator
        made(shape("qwen3-30b-a3b"), device="sim")


def test_there_is_no_file_to_map() -> None:
    with pytest.raises(ConfigError, match=r"store='mapped'.*leave store='auto'"):
        made(shape("tiny"), store="mapped")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def opened(of: Shape, routing: RoutingTrace | None = None, **options: Any) -> AsyncIterator[Engine]:
    config = {"kernels": "linear", "record": True, "chunk_tokens": 8, "dtype": "float32", **options}
    with anyio.fail_after(60):
        async with Engine(loader(of, routing), EngineConfig(**config)) as engine:
            yield engine


async def ran(engine: Engine, prompts: Sequence[list[int]] = PROMPTS) -> list[tuple[list[int], list[float | None]]]:
    """Run prompts side by side; returns the tokens of each and the logarithms of their chances."""
    options: dict[str, Any] = {"max_new_tokens": N_NEW, "do_sample": False, "logprobs": True}
    streams = [engine.generate_stream(prompt, **options) for prompt in prompts]
    tokens = [[token async for token in stream] for stream in streams]
    return [([token.id for token in one], [token.logprob for token in one]) for one in tokens]


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["tiny", *PUBLISHED])
async def test_tokens_are_the_same_on_a_simulated_accelerator(name: str) -> None:
    of = shape("tiny") if name == "tiny" else small(name)
    outcomes = []
    for device in ("cpu", "sim", "sim:rtx4090-desktop"):
        async with opened(of, device=device, waves="one", slots=None if device == "cpu" else 9) as engine:
            outcomes.append(await ran(engine))
            if device != "cpu":
                assert engine.statistics().n_slots == 9
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len({id for ids, _ in outcomes[0] for id in ids}) > 3


def replayed(trace: RoutingTrace, number: int, n_tokens: int, n_layers: int, field: str) -> NDArray[Any]:
    """What sequence `number` is to be told: the recording from its beginning, again where it ends, by layer."""
    recording = trace.recordings[number % len(trace.recordings)]
    rows = getattr(recording, field)[np.arange(n_tokens) % len(recording.experts)]
    return np.asarray(rows[:, np.arange(n_layers) % rows.shape[1]])


def matches(found: RoutingTrace, trace: RoutingTrace, prompts: Sequence[list[int]] = PROMPTS) -> None:
    """Assert that a run visited whom the trace says."""
    n_layers = len(found.n_experts)
    assert len(found.recordings) == len(prompts)
    for number, (recording, prompt) in enumerate(zip(found.recordings, prompts, strict=True)):
        n_tokens = len(prompt) + N_NEW - 1
        np.testing.assert_array_equal(recording.experts, replayed(trace, number, n_tokens, n_layers, "experts"))
        assert recording.ahead is not None
        expected = replayed(trace, number, n_tokens, n_layers, "ahead")
        np.testing.assert_array_equal(recording.ahead[:, 1:], expected[:, 1:])
        if trace.recordings[0].weights is not None:
            assert recording.weights is not None
            np.testing.assert_array_equal(recording.weights, replayed(trace, number, n_tokens, n_layers, "weights"))


@pytest.mark.anyio
@pytest.mark.parametrize("device", ["cpu", "sim", "sim:rtx4090-desktop"])
@pytest.mark.parametrize("waves", ["one", "two"])
async def test_a_recording_is_replayed(device: str, waves: Any) -> None:
    trace = recorded()
    async with opened(shape("tiny"), trace, device=device, waves=waves) as engine:
        await ran(engine)
        found = engine.routing()
    matches(found, trace)
    assert (found.model, found.n_experts) == ("tiny", (16,) * 6)


@pytest.mark.anyio
@pytest.mark.parametrize("name", PUBLISHED)
async def test_made_up_routing_keeps_the_routers_weights(name: str) -> None:
    of = small(name)
    trace = drawn(of, n_sequences=3, n_tokens=16)  # shorter than the prompts, and one less
    async with opened(of, trace) as engine:
        await ran(engine)
        found = engine.routing()
    matches(found, trace)
    for recording in found.recordings:
        assert recording.weights is not None
        np.testing.assert_allclose(recording.weights.sum(axis=-1), 1.0, atol=2e-3)


@pytest.mark.anyio
async def test_layers_repeat_where_a_recording_has_fewer() -> None:
    whole = recorded()
    cut = [replace(r, experts=r.experts[:, :4], weights=None, ahead=None) for r in whole.recordings]
    trace = replace(whole, n_experts=(16,) * 4, recordings=tuple(cut))
    async with opened(shape("tiny"), trace) as engine:
        await ran(engine, PROMPTS[:1])
        (found,) = engine.routing().recordings
    np.testing.assert_array_equal(found.experts, replayed(trace, 0, len(found.experts), 6, "experts"))
    np.testing.assert_array_equal(found.experts[:, :2], found.experts[:, 4:])


@pytest.mark.anyio
@pytest.mark.parametrize("with_graphs", [False, True])
async def test_recorded_steps_replay_it_too(with_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(3)
    monkeypatch.setattr(cuda, "open_gpu", lambda: gpu)
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trace, options = recorded(), {"device": "cuda", "slots": 20, "kv_tokens": 256, "graphs": with_graphs}
    async with opened(shape("tiny"), trace, **options) as engine:
        await ran(engine)
        found = engine.routing()
        assert engine.statistics().gpu.n_loads
    matches(found, trace)
    assert bool(gpu.n_graphs) == with_graphs


@pytest.mark.anyio
async def test_a_model_that_is_kept_starts_again_for_another_engine() -> None:
    trace, config = recorded(), EngineConfig(kernels="linear", record=True)
    kept = in_memory(shape("tiny"), config, routing=trace)

    def load_kept(_: EngineConfig) -> ServableModel:
        replay = kept.model.get_submodule("replayed_routing")
        assert isinstance(replay, Replay)
        replay.restart()
        return kept

    for _ in range(2):
        async with Engine(load_kept, config) as engine:
            await ran(engine)
            matches(engine.routing(), replace(trace, recordings=_without_weights(trace)))


def _without_weights(trace: RoutingTrace) -> Any:
    """Weights of a model in bfloat16 are rounded."""
    return tuple(replace(recording, weights=None) for recording in trace.recordings)


def test_a_recording_of_another_kind_of_model_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"24 sequences that visit \[2\] of \[16\] experts in .*; this one visits 8 of \[128\]"
    ):
        in_memory(shape("qwen3-30b-a3b:layers=1"), EngineConfig(), routing=recorded())
    some = [*recorded().recordings[:1], *_without_weights(recorded())[1:]]
    with pytest.raises(ConfigError, match="all must, or none"):
        Replay(replace(recorded(), recordings=tuple(some)), (16,), 2)
