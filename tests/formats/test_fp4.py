"""Quantised checkpoints in 4-bit floats: MXFP4 and NVFP4, in every naming."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.formats.folders import Pair, agrees, packed_bits, quantised, save_pair, save_source, saved
from tests.formats.writers import Writer, mxfp4, nvfp4
from tests.support.tiny import N_EXPERTS

WRITERS: dict[str, Writer] = {
    "mxfp4": mxfp4("weight_packed", "weight_scale"),
    "deepseek": mxfp4("weight", "scale", signed=True, typed=True),
    "modelopt": nvfp4("weight", "weight_scale_2"),
    "nvfp4": nvfp4("weight_packed", "weight_global_scale", divides=True),
}
METHODS = {"mxfp4": "compressed-tensors", "deepseek": "fp8", "modelopt": "modelopt", "nvfp4": "compressed-tensors"}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("name", WRITERS)
async def test_values_are_those_of_transformers(tmp_path: Path, name: str, kind: str) -> None:
    pair = save_pair(tmp_path, kind, WRITERS[name], {"quant_method": METHODS[name]})
    await agrees(pair)
    assert packed_bits(pair) <= 4.6


def stack(tensors: dict[str, Tensor], write: Writer, prefix: str) -> tuple[dict[str, Tensor], Tensor]:
    """Write each expert of a fused parameter and put the parts on each other, `[n, …]`."""
    written = [write(matrix) for matrix in tensors[prefix].float()]
    parts = {name: torch.stack([each[name] for each, _ in written]) for name in written[0][0]}
    return parts, torch.stack([decoded for _, decoded in written])


def save_gpt_oss(folder: Path) -> Pair:
    """Write a gpt-oss as it is published."""
    source, tensors = save_source(folder, "gpt_oss")
    stored, decoded = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        turned = {name: stored.pop(name).mT}
        parts, values = stack(turned, mxfp4("blocks", "scales"), name)
        stored[f"{name}_blocks"] = parts["blocks"].unflatten(-1, (-1, 16)).contiguous()
        stored[f"{name}_scales"] = parts["scales"]
        decoded[name] = values.mT.contiguous()
    return saved(folder, source, stored, decoded, {"quant_method": "mxfp4"})


@pytest.mark.anyio
async def test_gpt_oss_is_fused_with_gate_and_up_interleaved(tmp_path: Path) -> None:
    pair = save_gpt_oss(tmp_path)
    await agrees(pair)
    assert packed_bits(pair) == 4.25


def swapped(name: str) -> str:
    """Return a name as ModelOpt writes it where it has taken a fused parameter apart."""
    return re.sub(r"experts\.(\d+)\.(\w+)\.", r"experts.\2.\1.", name)


def fused(stored: dict[str, Tensor], *, flat: bool) -> dict[str, Tensor]:
    """Return per-expert NVFP4 tensors put together: a layer's gates over its ups, on each other or `flat`."""
    made = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    parts = {"weight": "", "weight_scale": "_weight_scale", "weight_scale_2": "_weight_scale_2"}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for part, ending in parts.items():
            matrices = {
                p: [stored[f"{experts}.{e}.{p}_proj.{part}"] for e in range(N_EXPERTS)]
                for p in ("gate", "up", "down")
            }
            down, both = torch.stack(matrices["down"]), [torch.stack(matrices[p]) for p in ("gate", "up")]
            up = torch.stack(both, dim=1) if part == "weight_scale_2" else torch.cat(both, dim=1)
            if part != "weight_scale_2" and flat:
                up, down = up.flatten(0, 1), down.flatten(0, 1)
            made |= {f"{experts}.gate_up_proj{ending}": up, f"{experts}.down_proj{ending}": down}
    return made


@pytest.mark.anyio
@pytest.mark.parametrize("naming", ["expert last", "fused", "stacked"])
async def test_namings_of_modelopt(tmp_path: Path, naming: str) -> None:
    source, tensors = save_source(tmp_path)
    stored, decoded = quantised(tensors, nvfp4("weight", "weight_scale_2"))
    if naming == "expert last":
        stored = {swapped(name): tensor for name, tensor in stored.items()}
    else:
        stored = fused(stored, flat=naming == "stacked")
    pair = saved(tmp_path, source, stored, decoded, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    await agrees(pair)
