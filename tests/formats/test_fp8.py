"""Quantised checkpoints in 8-bit floats: blocks, rows, tensors, and powers of two."""

from pathlib import Path

import pytest
import torch

from tests.formats.folders import agrees, packed_bits, save_pair
from tests.formats.writers import Writer, fp8, fp8_scalar, mxfp8

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WRITERS: dict[str, Writer] = {
    "deepseek": fp8(128, 128),
    "qwen": fp8(128, 128, dtype=torch.bfloat16),
    "tensor": fp8_scalar("weight_scale_inv"),
    "channel": fp8(1, 0, name="weight_scale"),
    "ue8m0": mxfp8("scale", rows=128, columns=128, typed=True),
    "minimax": mxfp8("weight_scale_inv"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("name", WRITERS)
async def test_values_are_those_of_transformers(tmp_path: Path, name: str, kind: str) -> None:
    pair = save_pair(tmp_path, kind, WRITERS[name], FP8)
    await agrees(pair)
    assert packed_bits(pair) < 8.5
