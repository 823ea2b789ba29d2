"""Quantised checkpoints on the fake GPU: logits are those of the CPU, and what is moved are packed bytes."""

import re
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio
import pytest
import torch
from torch import Tensor

from fiddler import Engine
from fiddler.config import EngineConfig
from fiddler.devices.formula import gated
from fiddler.devices.kernels import Kernels
from fiddler.engine.gpu_assembly import needs
from fiddler.errors import ConfigError
from fiddler.formats.packed import Code, Packed
from fiddler.gpu import cuda, scratch
from fiddler.gpu.slots import SlotExperts
from fiddler.gpu.stack import PackedStack, StackedMatrix
from fiddler.gpu.visits import Visits
from fiddler.store.layout import BlockLayout
from fiddler.types import Statistics
from tests.engine.test_fake_gpu import LONG, close, on_gpu
from tests.engine.test_invariance import RAGGED
from tests.formats.as_blocks import read_as_blocks, save_bytes
from tests.formats.blocks import RUNS
from tests.formats.folders import Pair, save_pair
from tests.formats.test_compressed import LARGE, scheme
from tests.formats.test_fp4 import save_gpt_oss
from tests.formats.writers import Writer, fp8, integers, mxfp4, nf4, nvfp4
from tests.support.fake_gpu import FakeGpu
from tests.support.placement import Placement, Subject, run

FORMATS: dict[str, tuple[str, Writer, dict[str, Any]]] = {
    "nvfp4": ("qwen3_moe", nvfp4("weight", "weight_scale_2"), {"quant_method": "modelopt"}),
    "fp8": ("mixtral", fp8(128, 128), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "mxfp4": ("qwen3_moe", mxfp4("weight_packed", "weight_scale"), {"quant_method": "compressed-tensors"}),
    "int4": ("mixtral", integers(4, 32, symmetric=False), scheme(4, 32)),
    "nf4": ("qwen3_moe", nf4(nested=True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}

EVERY = 16
"""Experts of each model."""


def save(folder: Path, name: str) -> Pair:
    """Write a tiny checkpoint in a format of `FORMATS`, or gpt-oss."""
    if name == "gpt_oss":
        return save_gpt_oss(folder)
    kind, write, settings = FORMATS[name]
    sizes = LARGE if name == "nf4" else {}  # whose blocks must divide rows
    return save_pair(folder, kind, write, settings, **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return cache(lambda name: save(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="module")
def subject(folder: Callable[[str], Pair]) -> Callable[[str], Subject]:
    return cache(lambda name: Subject.open(folder(name).quantised, Kernels()))


@pytest.mark.parametrize("name", [*FORMATS, "gpt_oss"])
@pytest.mark.parametrize("slots", [0, 5, EVERY])
def test_logits_are_those_of_the_cpu(subject: Callable[[str], Subject], name: str, slots: int) -> None:
    model = subject(name)
    assert model.n_experts == EVERY
    plain = run(model, RAGGED)
    played = run(model, RAGGED, on_gpu(FakeGpu(slots), slots, waves="one"))
    assert not played.differs_from(plain)
    counters = played.rig.side.work.counters
    assert bool(slots) == bool(counters["gpu"].n_loads)
    assert counters["link"].n_bytes == counters["link"].n_loads * model.packed.weights(0, 0).nbytes


@pytest.mark.parametrize("pinnable", [0, 40_000])
def test_no_order_of_the_streams_changes_a_bit(subject: Callable[[str], Subject], pinnable: float) -> None:
    model = subject("nvfp4")
    plain = run(model, RAGGED)
    for seed in range(6):
        played = run(model, RAGGED, on_gpu(FakeGpu(seed, pinnable=pinnable), 4, waves="one"))
        assert not played.differs_from(plain)


def test_a_slot_is_as_large_as_what_is_packed(subject: Callable[[str], Subject]) -> None:
    for name in FORMATS:
        weights = subject(name).packed.weights(0, 0)
        assert all(isinstance(matrix, Packed) for matrix in weights.matrices)
        n_numbers = sum(prod(matrix.shape) for matrix in weights.matrices)
        played = run(subject(name), RAGGED, on_gpu(FakeGpu(), 5, waves="one"))
        arena = played.rig.side.work.copying.arena
        assert weights.nbytes <= arena.slot_bytes < n_numbers * (1.2 if name == "fp8" else 0.75)


def test_the_scratch_is_part_of_what_a_step_takes(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = subject("fp8").packed, list[int]()
    for most in (0, 1 << 30):
        monkeypatch.setattr(scratch, "SCRATCH_BYTES", most)
        sizes.append(needs(model, FakeGpu(), 4).workspace)
    largest = 4 * max(prod(matrix.shape) for matrix in model.weights(0, 0).matrices)
    assert sizes[1] - sizes[0] == 2 * (8 - 1) * largest  # 8 experts and not one, and torch has them twice


def run_blindly(self: SlotExperts, layer: int, visits: Visits, hidden: Tensor, out: Tensor) -> None:
    """Run experts as the Triton kernel does, on numbers that the host does not know; every slot is decoded."""
    stack, rows = self._stacks(layer), torch.arange(visits.n_rows)
    group = torch.searchsorted(visits.bounds.long(), rows, right=True) - 1
    inside = rows < visits.bounds[-1]
    slot = visits.slots.long()[group.clamp(max=len(visits.slots) - 1)]
    positions = visits.positions.long()

    def multiply(x: Tensor, matrix: StackedMatrix) -> Tensor:
        assert isinstance(matrix, PackedStack)
        dense = torch.stack([matrix.dense(i, x.dtype) for i in range(matrix.shape[0])])
        return torch.einsum("ri,roi->ro", x, dense[slot])

    ups = [multiply(hidden[positions // visits.top_k], matrix) for matrix in stack.up]
    y = multiply(gated(self._formulas[layer], ups), stack.down)
    out.index_copy_(0, positions, torch.where(inside[:, None], y, out[positions]))


def test_recorded_steps_of_quantised_experts(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SlotExperts.run

    def either(self: SlotExperts, layer: int, visits: Visits, hidden: Tensor, out: Tensor) -> None:
        (own if visits.groups else run_blindly)(self, layer, visits, hidden, out)

    monkeypatch.setattr("fiddler.steps.graphs.LEAST_TOKENS", 4)
    monkeypatch.setattr(SlotExperts, "blind", lambda *_: True)
    monkeypatch.setattr(SlotExperts, "run", either)
    model = subject("nvfp4")
    plain = run(model, LONG, Placement(EngineConfig(waves="one")))
    for slots in (7, EVERY):
        gpu = FakeGpu(7)
        assert close(run(model, LONG, on_gpu(gpu, slots, graphs=True, waves="one")), plain)
        assert gpu.n_graphs


def on_fake(budget: int) -> EngineConfig:
    return EngineConfig(device="cuda", dtype="float32", vram_budget=budget, kv_tokens=64, graphs=False)


def generated(folder: Path, config: EngineConfig) -> tuple[list[int], Statistics]:
    """Return the tokens of an engine whose GPU, if it has one, is a fake."""

    async def generate() -> tuple[list[int], Statistics]:
        async with Engine(folder, config) as engine:
            options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
            result = await engine.generate([5, 6, 7, 8, 9], **options)
            return list(result.token_ids), engine.statistics()

    with patch.object(cuda, "open_gpu", FakeGpu), patch.object(torch.cuda, "is_available", lambda: True):
        return anyio.run(generate)


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_an_engine_calibrates_and_generates(folder: Callable[[str], Pair], name: str) -> None:
    expected, _ = generated(folder(name).quantised, EngineConfig(device="cpu", dtype="float32"))
    tokens, statistics = generated(folder(name).quantised, on_fake(64 << 20))
    assert tokens == expected
    assert statistics.n_slots == EVERY


@pytest.mark.parametrize("code", RUNS, ids=lambda code: code.value)
def test_blocks_of_gguf_are_moved_and_held_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code
) -> None:
    read_as_blocks(monkeypatch, code)
    model = Subject.open(save_bytes(tmp_path, code).quantised, Kernels())
    weights = model.packed.weights(0, 0)
    assert [matrix.code for matrix in weights.matrices if isinstance(matrix, Packed)] == [code] * 3
    plain = run(model, RAGGED)
    for slots in (5, EVERY):
        played = run(model, RAGGED, on_gpu(FakeGpu(slots), slots, waves="one"))
        assert not played.differs_from(plain)
        work = played.rig.side.work
        assert work.counters["gpu"].n_loads
        assert work.counters["link"].n_bytes == work.counters["link"].n_loads * weights.nbytes
        assert weights.nbytes <= work.copying.arena.slot_bytes < weights.nbytes * 1.01


@pytest.mark.parametrize("code", [Code.MXFP4, Code.Q6_K], ids=lambda code: code.value)
def test_a_budget_buys_slots_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code) -> None:
    read_as_blocks(monkeypatch, code)
    folder = save_bytes(tmp_path, code).quantised
    slot = BlockLayout.of(Subject.open(folder, Kernels()).packed.weights(0, 0)).nbytes
    with pytest.raises(ConfigError) as error:
        generated(folder, on_fake(2 << 20))  # the dense part fits, so the workspace is known
    named = re.search(r"vram_budget to at least (\d+)", str(error.value))
    assert named is not None
    least = int(named[1])  # for one slot
    expected, _ = generated(folder, EngineConfig(device="cpu", dtype="float32"))
    for n_slots, budget in ((2, least + 2 * slot - 1), (3, least + 2 * slot)):
        tokens, statistics = generated(folder, on_fake(budget))
        assert tokens == expected
        assert statistics.n_slots == n_slots
