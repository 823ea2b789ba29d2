"""Every expert's tensors are held against the configuration when a checkpoint is opened, by headers alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiddler import CheckpointError, EngineConfig
from fiddler.cli.facts import read_facts
from fiddler.errors import ModelError, UnsupportedModelError
from fiddler.models.loaded import load
from fiddler.models.naming import expert_layout
from fiddler.models.seam import find_experts
from fiddler.models.skeleton import meta_skeleton, read_config
from fiddler.store.checkpoint import Checkpoint, Entry
from tests.support.tiny import save_tiny

LAYER = "model.layers.1.mlp.experts"
LAST = f"{LAYER}.7"
"""An expert that is not the first of a layer that is not the first."""


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def refused(folder: Path, *words: str, error: type[ModelError] = CheckpointError) -> None:
    """Opening says all words, and so do looking at it and opening it packed."""
    attempts: tuple[Callable[[], Any], ...] = (
        lambda: load(folder, EngineConfig()),
        lambda: load(folder, EngineConfig(store="packed")),
        lambda: read_facts(folder, trust_remote_code=False),
    )
    for attempt in attempts:
        with pytest.raises(error) as found:
            attempt()
        assert all(word in str(found.value) for word in words), str(found.value)


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize(
    "shape", [(1, 32), (32, 1), (1,), (64,), (64, 32, 1), (0, 32), (31, 64), (64, 33), (64, 64), ()], ids=str
)
def test_a_matrix_of_another_shape(tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    name = f"{LAST}.{part}.weight"
    folder = edit(save_tiny(tmp_path), lambda tensors: tensors.update({name: torch.rand(shape)}))
    refused(folder, repr(name), str(list(shape)), "[64, 32]" if part == "down_proj" else "[64, 64]")


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_a_matrix_that_is_turned(tmp_path: Path, part: str) -> None:
    name = f"{LAST}.{part}.weight"
    refused(edit(save_tiny(tmp_path), lambda t: t.update({name: t[name].t()})), repr(name))


def test_gate_and_down_in_each_others_place(tmp_path: Path) -> None:
    gate, down = f"{LAST}.gate_proj.weight", f"{LAST}.down_proj.weight"
    refused(edit(save_tiny(tmp_path), lambda t: t.update({gate: t[down], down: t[gate]})), "experts.7")


def test_halves_that_are_whole_together_only(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAST}.gate_proj.weight"] = torch.rand(31, 64)
        tensors[f"{LAST}.up_proj.weight"] = torch.rand(33, 64)

    refused(edit(save_tiny(tmp_path), change), f"{LAST}.gate_proj", "[31, 64]")


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"])
def test_fused_experts_that_are_turned_and_interleaved(tmp_path: Path, part: str) -> None:
    """gpt-oss: a tensor for all experts, transposed, gate and up in turn, with biases."""
    name = f"{LAYER}.{part}"
    narrower = edit(save_tiny(tmp_path / "a", "gpt_oss"), lambda t: t.update({name: t[name][..., :-1]}))
    refused(narrower, repr(name))
    if not part.endswith("bias"):
        refused(
            edit(save_tiny(tmp_path / "b", "gpt_oss"), lambda t: t.update({name: t[name].mT[:, :-2]})), repr(name)
        )
    fewer = edit(save_tiny(tmp_path / "c", "gpt_oss"), lambda t: t.update({name: t[name][:-1]}))
    refused(fewer, name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("expert", [0, 7])
def test_numbers_that_are_no_floats_of_16_bits(tmp_path: Path, dtype: torch.dtype, expert: int) -> None:
    name = f"{LAYER}.{expert}.down_proj.weight"
    folder = edit(save_tiny(tmp_path), lambda t: t.update({name: torch.zeros(64, 32).to(dtype)}))
    if dtype == torch.bool:
        refused(folder, repr(name), "experts must be one of F64, F32, F16, BF16")
    else:
        refused(folder, repr(name), "quantised in a way", "or without its scales", error=UnsupportedModelError)


@pytest.mark.parametrize("store", ["mapped", "packed"])
def test_floats_of_several_kinds_are_converted(tmp_path: Path, store: Any) -> None:
    kinds = {0: torch.float64, 3: torch.float16, 7: torch.bfloat16}
    names = {e: [f"{LAYER}.{e}.{part}_proj.weight" for part in ("gate", "up", "down")] for e in kinds}

    def change(tensors: dict[str, Tensor]) -> None:
        for expert, (gate, _, down) in names.items():
            tensors[gate], tensors[down] = tensors[gate].to(kinds[expert]), tensors[down].to(kinds[expert])

    folder = edit(save_tiny(tmp_path), change)
    saved, loaded = load_file(folder / "model.safetensors"), load(folder, EngineConfig(store=store))
    for expert, (gate, up, down) in names.items():
        weights = loaded.weights(1, expert)
        assert {matrix.dtype for matrix in (*weights.up, weights.down)} == {torch.float32}
        assert torch.equal(torch.cat(weights.up), torch.cat([saved[gate].float(), saved[up].float()]))
        assert torch.equal(weights.down, saved[down].float())


def test_a_configuration_of_another_size(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
    refused(folder, "model.layers.0.mlp.experts.0.gate_proj.weight", "[32, 64]")


def test_each_header_is_looked_at_once(tmp_path: Path) -> None:
    """A checkpoint of 48 layers with 128 experts has 18,432 of them."""
    folder = save_tiny(tmp_path)
    checkpoint = Checkpoint.open(folder)
    asked: list[str] = []

    class Noted(dict[str, Entry]):
        def __getitem__(self, name: str) -> Entry:
            asked.append(name)
            return super().__getitem__(name)

    checkpoint.entries = Noted(checkpoint.entries)
    skeleton = meta_skeleton(checkpoint, read_config(folder))
    expert_layout(skeleton, find_experts(skeleton), checkpoint)
    assert sorted(asked) == sorted(name for name in checkpoint.entries if ".experts." in name)
