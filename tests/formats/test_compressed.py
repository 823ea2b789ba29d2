"""Quantised checkpoints of compressed-tensors: integers and floats of 8 bits; those of 4 are in `test_fp4`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.folders import agrees, packed_bits, quantised, save_pair, save_source, saved
from tests.formats.writers import Writer, fp8, int8_rows, integers, mxfp8

LARGE = {"head_dim": 32, "hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
"""Sizes that 128 divides."""


def scheme(bits: int, group: int | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": group, "strategy": "group" if group else "channel"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


CASES: dict[str, tuple[Writer, dict[str, Any], float]] = {
    "int4 32": (integers(4, 32), scheme(4, 32), 4.5),
    "int4 128": (integers(4, 128), scheme(4, 128), 4.125),
    "int4 channel": (integers(4, 0), scheme(4), 4.15),
    "int4 32 asymmetric": (integers(4, 32, symmetric=False), scheme(4, 32), 4.75),
    "int4 channel asymmetric": (integers(4, 0, symmetric=False), scheme(4), 4.25),
    "int8 64": (integers(8, 64, dtype=torch.float32), scheme(8, 64), 8.5),
    "int8 channel": (integers(8, 0), scheme(8), 8.15),
    "int8 32 asymmetric": (integers(8, 32, symmetric=False), scheme(8, 32), 8.75),
    "int8 by rows": (int8_rows, scheme(8), 8.3),
    "fp8 channel": (fp8(1, 0, "weight_scale", torch.bfloat16), scheme(8), 8.15),
    "fp8 tensor": (fp8(0, 0, "weight_scale"), scheme(8), 8.01),
    "fp8 block": (fp8(128, 128, "weight_scale", torch.bfloat16), scheme(8), 8.01),
    "mxfp8": (mxfp8("weight_scale"), scheme(8, 32), 8.25),
}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("name", CASES)
async def test_values_are_those_of_transformers(tmp_path: Path, name: str, kind: str) -> None:
    write, settings, bits = CASES[name]
    sizes = LARGE if "128" in name or "64" in name else {}
    if kind == "mixtral":
        sizes = {key: value for key, value in sizes.items() if key != "moe_intermediate_size"}
    pair = save_pair(tmp_path, kind, write, settings, **sizes)
    await agrees(pair)
    assert packed_bits(pair) <= bits


WEIGHTS_8: dict[str, tuple[Writer, dict[str, Any]]] = {
    "floats of 8 bits": (fp8(1, 0, "weight_scale"), {"num_bits": 8, "type": "float"}),
    "integers a row": (integers(8, 0), {"num_bits": 8, "type": "int"}),
    "integers, half the group": (integers(8, 32), {"num_bits": 8, "type": "int", "group_size": 32}),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", WEIGHTS_8)
async def test_integers_of_4_bits_beside_others(tmp_path: Path, name: str) -> None:
    """Neither words nor groups tell 4 bits from 8 here; `weight_shape` does."""
    group = 64 if "group" in name else 0
    write, scheme_8 = WEIGHTS_8[name]
    source, tensors = save_source(tmp_path, **LARGE)
    four, eight = quantised(tensors, integers(4, group)), quantised(tensors, write)
    stored, decoded = ({n: t for n, t in each.items() if ".self_attn." in n} for each in eight)
    for mine, others in ((stored, four[0]), (decoded, four[1])):
        mine |= {n: t for n, t in others.items() if ".self_attn." not in n}
    schemes = {"a": {"weights": scheme_8}, "b": {"weights": {"num_bits": 4, "type": "int", "group_size": group}}}
    pair = saved(
        tmp_path, source, stored, decoded, {"quant_method": "compressed-tensors", "config_groups": schemes}
    )
    await agrees(pair)
    assert packed_bits(pair) <= 4.3
