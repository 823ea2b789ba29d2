"""`expert_dtype`: experts kept in other codes than the checkpoint's, wherever they run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fiddler import EngineConfig
from fiddler.errors import CheckpointError, ConfigError
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantise import TARGETS, quantise
from fiddler.models.loaded import load
from tests.formats.folders import SIZES, Pair, error, save_pair
from tests.formats.writers import fp8, nvfp4
from tests.support.tiny import save_tiny

MODELOPT = {"quant_method": "modelopt"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def beside_twin(folder: Path, kind: str, to: str) -> Pair:
    """Return a plain checkpoint, and one whose experts have been through codes."""
    source = save_tiny(folder / "source", kind, **SIZES[kind])
    twin = save_tiny(folder / "twin", kind, **SIZES[kind])
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name and not name.endswith("bias"):
            tensors[name] = through(tensor, to)
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    return Pair(source, twin)


def through(tensor: Tensor, to: str) -> Tensor:
    """Return a matrix, or several that are stored `[in, out]`, decoded from its codes."""
    if tensor.dim() == 3:
        return torch.stack([through(matrix.t(), to).t() for matrix in tensor]).contiguous()
    return quantise(tensor, TARGETS[to]).dense(torch.float32)


@pytest.mark.anyio
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize(("kind", "to"), [("qwen3_moe", "int4"), ("gpt_oss", "int8"), ("gpt_oss", "int4")])
async def test_values_are_those_of_the_codes(tmp_path: Path, kind: str, to: Any, device: str) -> None:
    pair = beside_twin(tmp_path, kind, to)
    model = AutoModelForCausalLM.from_pretrained(pair.twin, dtype=torch.float32).eval()
    config = EngineConfig(dtype="float32", expert_dtype=to, device=device)
    assert await error(pair, model, config) < 1e-4
    weights = load(pair.quantised, config).weights(0, 1)
    bits = [8 * m.nbytes / m.shape[0] / m.shape[1] for m in weights.matrices]
    assert max(bits) <= {"int4": 4.5, "int8": 8.2}[to]


def test_quantised_experts_are_decoded_once(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "qwen3_moe", fp8(128, 128), FP8)
    decoded = load(pair.quantised, EngineConfig(dtype="float32", expert_dtype="bf16")).weights(1, 2)
    twin = load(pair.twin, EngineConfig(dtype="float32", store="packed")).weights(1, 2)
    assert torch.allclose(torch.cat(decoded.up), torch.cat(twin.up))  # type: ignore[arg-type]
    assert torch.allclose(decoded.down, twin.down)  # type: ignore[arg-type]


def test_fewer_bits_only(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, "qwen3_moe", fp8(128, 128), FP8)
    for to, code in (("int8", Code.FP8), ("int4", Code.INT4)):
        weights = load(pair.quantised, EngineConfig(expert_dtype=to)).weights(0, 0)  # type: ignore[arg-type]
        assert {m.code for m in weights.matrices if isinstance(m, Packed)} == {code}


def test_rows_that_groups_do_not_divide_stay_in_4_bits(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 48, "intermediate_size": 48}
    folder = save_pair(tmp_path, "qwen3_moe", nvfp4("weight", "weight_scale_2"), MODELOPT, **sizes).quantised
    weights = load(folder, EngineConfig(expert_dtype="int4")).weights(0, 0)
    assert {m.code for m in weights.matrices if isinstance(m, Packed)} == {Code.FP4}


@pytest.mark.parametrize("expert", [0, 3])
def test_an_expert_that_cannot_be_quantised_is_named(tmp_path: Path, expert: int) -> None:
    folder = save_tiny(tmp_path, "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"expert {expert} of layer 1: a number is not finite"):
        load(folder, EngineConfig(expert_dtype="int8"))


def test_what_cannot_be(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen3_moe", moe_intermediate_size=40)
    with pytest.raises(ConfigError, match=r"expert_dtype='int4' needs rows of a multiple of 32 .* have 40; use"):
        load(folder, EngineConfig(expert_dtype="int4"))
    assert load(folder, EngineConfig(expert_dtype="int8")).store.weights(0, 0).nbytes
    with pytest.raises(ConfigError, match=r"store='mapped' has experts as files do; .*expert_dtype='int8'"):
        load(folder, EngineConfig(expert_dtype="int8", store="mapped"))
