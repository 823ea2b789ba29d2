"""Quantised checkpoints that lie otherwise than the floats of their architecture, or mix formats."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.architectures import build
from tests.formats.folders import WITHIN, agrees, packed_bits, save_source, saved
from tests.formats.writers import Writer, fp8, integers, mxfp4, mxfp8, nvfp4

Tensors = dict[str, Tensor]
NVFP4 = nvfp4("weight", "weight_scale_2")
EXACT = {"float32": WITHIN["float32"]}
"""What is held; these models' logits are large, and bf16's last bits show in them."""


def split(name: str, fused: Tensor) -> Tensors:
    """Return a fused parameter as matrices, `experts.3.gate_proj.weight`."""
    path, _, matrix = name.rpartition(".")
    kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[matrix]
    return {
        f"{path}.{expert}.{kind}.weight": part
        for expert, own in enumerate(fused)
        for kind, part in zip(kinds, own.chunk(len(kinds)), strict=True)
    }


def expert_last(name: str) -> str:
    return re.sub(r"experts\.(\d+)\.(\w+)\.", r"experts.\2.\1.", name)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("architecture", "write", "rename"),
    [("gemma4", fp8(1, 0, "weight_scale"), str), ("gemma4", NVFP4, str), ("qwen3_vl_moe", NVFP4, expert_last)],
    ids=["fp8", "nvfp4", "expert last"],
)
async def test_fused_in_floats_and_apart_when_quantised(
    tmp_path: Path, architecture: str, write: Writer, rename: Callable[[str], str]
) -> None:
    source = tmp_path / "source"
    build(architecture).save_pretrained(source)
    decoded = load_file(source / "model.safetensors")
    stored: Tensors = {}
    for name, tensor in list(decoded.items()):
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            stored[name] = tensor
            continue
        values = {}
        for own, matrix in split(name, tensor).items():
            parts, values[own] = write(matrix.float())
            stem = rename(own).removesuffix("weight")
            stored |= {stem + ending: part.clone() for ending, part in parts.items()}
        whole = list(values.values())
        if "gate_up" in name:
            whole = [torch.cat(pair) for pair in zip(whole[0::2], whole[1::2], strict=True)]
        decoded[name] = torch.stack(whole)
    await agrees(saved(tmp_path, source, stored, decoded, {"quant_method": "modelopt"}), EXACT)


@pytest.mark.anyio
async def test_deepseek_v4_has_experts_in_4_bits_and_the_rest_in_8(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build("deepseek_v4").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    kinds = {
        r".*\.ffn\.experts\.\d+\.w\d\.weight": mxfp4("weight", "scale", signed=True, typed=True),
        r".*\.(attn\.w\w+|ffn\.shared_experts\.w\d)\.weight": mxfp8("scale", rows=128, columns=128, typed=True),
    }
    stored, decoded = mixed(tensors, kinds)
    assert {stored[name].dtype for name in stored if name.endswith("scale")} >= {torch.float8_e8m0fnu}
    pair = saved(tmp_path, source, stored, decoded, {"quant_method": "fp8", "scale_fmt": "ue8m0"})
    await agrees(pair, EXACT)
    assert packed_bits(pair) < 4.5


@pytest.mark.anyio
async def test_formats_are_mixed_by_tensor(tmp_path: Path) -> None:
    """As Kimi K2 mixes them."""
    source = tmp_path / "source"
    build("deepseek_v3").save_pretrained(source)
    kinds = {
        r".*mlp\.experts\.\d+\.\w+\.weight": integers(4, 16),
        r".*(self_attn\.\w+_proj\w*|shared_experts\.\w+)\.weight": fp8(128, 128),
    }
    stored, decoded = mixed(load_file(source / "model.safetensors"), kinds)
    weights = {"num_bits": 4, "group_size": 16}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    await agrees(saved(tmp_path, source, stored, decoded, settings), EXACT)


def mixed(tensors: Tensors, kinds: dict[str, Writer]) -> tuple[Tensors, Tensors]:
    """Return the tensors with matrices replaced by the first pattern that has their names, and decoded."""
    stored, decoded = dict(tensors), dict(tensors)
    for name in tensors:
        for pattern, write in kinds.items():
            if re.fullmatch(pattern, name):
                parts, decoded[name] = write(stored.pop(name).float())
                stem = name.removesuffix("weight")
                stored |= {stem + ending: part.contiguous() for ending, part in parts.items()}
                break
    assert len(stored) > len(tensors)
    return stored, decoded


@pytest.mark.anyio
@pytest.mark.parametrize("block", [(128, 128), (1, 0), (0, 0)], ids=["block", "channel", "tensor"])
async def test_apart_in_floats_and_fused_when_quantised(tmp_path: Path, block: tuple[int, int]) -> None:
    source, tensors = save_source(tmp_path, num_experts=4)
    stored = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    decoded = dict(tensors)
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        for parameter, kinds in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            written = []
            for expert in range(4):
                names = [f"{path}.{expert}.{kind}.weight" for kind in kinds]
                parts, values = fp8(*block)(torch.cat([tensors[name] for name in names]))
                decoded |= {name: part.clone() for name, part in zip(names, values.chunk(len(names)), strict=True)}
                written.append(parts)
            stored[f"{path}.{parameter}"] = torch.stack([parts["weight"] for parts in written])
            stored[f"{path}.{parameter}_scale_inv"] = torch.stack([parts["weight_scale_inv"] for parts in written])
    pair = saved(tmp_path, source, stored, decoded, {"quant_method": "fp8"})
    await agrees(pair)
    assert packed_bits(pair) < 8.5


@pytest.mark.anyio
async def test_fused_experts_that_are_a_weight_of_their_own(tmp_path: Path) -> None:
    """As Granite has them in every number format: `input_linear.weight`, in three dimensions."""
    source = tmp_path / "source"
    build("granitemoe").save_pretrained(source)
    stored, decoded = (load_file(source / "model.safetensors") for _ in range(2))
    for name in [name for name in stored if name.endswith("_linear.weight")]:
        written = [fp8(1, 0, "weight_scale")(matrix) for matrix in stored.pop(name)]
        decoded[name] = torch.stack([values for _, values in written])
        stored |= {
            name.removesuffix("weight") + part: torch.stack([parts[part] for parts, _ in written])
            for part in ("weight", "weight_scale")
        }
    await agrees(saved(tmp_path, source, stored, decoded, {"quant_method": "compressed-tensors"}), EXACT)
