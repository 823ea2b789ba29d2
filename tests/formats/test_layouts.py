"""The bytes that simulations count with are those of matrices as they lie in memory."""

from typing import Any

import pytest
import torch

from fiddler.formats.ggml import BLOCKS
from fiddler.formats.layouts import LAYOUTS, announced_layout
from fiddler.formats.packed import Code, Packed
from fiddler.formats.quantise import TARGETS, quantise

ROWS, COLUMNS = 200, 384
STORED = {
    "fp8": (Code.FP8, torch.float32, (128, 128), False),
    "mxfp8": (Code.FP8, torch.float8_e8m0fnu, (1, 32), False),
    "mxfp4": (Code.FP4, torch.float8_e8m0fnu, (1, 32), False),
    "nvfp4": (Code.FP4, torch.float8_e4m3fn, (1, 16), False),
    "int4-128": (Code.INT4, torch.float16, (1, 128), True),
}
"""Code, scales, block, and whether there are zeros."""


def integers(bits: int, layout: str = "pack-quantized") -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"weights": {"num_bits": bits}}},
    }


@pytest.mark.parametrize("name", STORED)
def test_a_published_matrix_is_as_large_as_its_layout_says(name: str) -> None:
    code, scale, block, zeros = STORED[name]
    grid = -(-ROWS // block[0]), -(-COLUMNS // block[1])
    codes = torch.zeros(ROWS, code.width(COLUMNS), dtype=torch.uint8)
    kept = torch.zeros(grid, dtype=torch.uint8) if zeros else None
    packed = Packed(code, codes, torch.ones(grid).to(scale), (ROWS, COLUMNS), block, kept)
    assert packed.nbytes == LAYOUTS[name].nbytes(ROWS, COLUMNS)


@pytest.mark.parametrize("to", TARGETS)
def test_a_matrix_that_we_quantise_is_as_large_as_its_layout_says(to: str) -> None:
    packed = quantise(torch.ones(ROWS, COLUMNS), TARGETS[to])
    assert packed.nbytes == TARGETS[to].layout.nbytes(ROWS, COLUMNS)
    assert TARGETS[to].layout in LAYOUTS.values()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_run_of_gguf_is_as_large_as_its_layout_says(name: str) -> None:
    assert LAYOUTS[name].nbytes(3, 2 * BLOCKS[name].columns) == 6 * BLOCKS[name].nbytes


def test_every_layout_is_held_against_a_matrix() -> None:
    ours = [name for name, layout in LAYOUTS.items() if layout in {target.layout for target in TARGETS.values()}]
    assert LAYOUTS.keys() == {*STORED, *BLOCKS, *ours}


def test_rows_that_blocks_must_fill_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 1408 columns are not filled by blocks of 256"):
        LAYOUTS["q4_k"].nbytes(1, 1408)


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8-rows"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4-128"),
        (integers(4), "int4"),
        (integers(8), "int8"),
        (integers(4, "nvfp4-pack-quantized"), "nvfp4"),
    ],
    ids=str,
)
def test_a_configuration_announces_a_layout(about: dict[str, Any], name: str) -> None:
    assert announced_layout({"quantization_config": about}) == name


def test_experts_of_fp4_beside_a_dense_part_of_fp8() -> None:
    about = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert announced_layout({"expert_dtype": "fp4", "quantization_config": about}) == "mxfp4"


@pytest.mark.parametrize("about", [None, {}])
def test_no_configuration_is_floats(about: Any) -> None:
    assert announced_layout({"quantization_config": about}) is None


@pytest.mark.parametrize(
    "about",
    [
        "mxfp4",
        {"quant_method": "aqlm"},
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "compressed-tensors"},
        integers(3),
        {**integers(4), "config_groups": {"group_0": {"weights": None}}},
    ],
    ids=str,
)
def test_what_announces_nothing_known_is_refused(about: Any) -> None:
    with pytest.raises(ValueError, match="does not say one of fp8"):
        announced_layout({"quantization_config": about})
