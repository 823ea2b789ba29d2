"""GGUF's blocks in the kernels, against formats/ggml.py: in Triton's interpreter where there is no GPU."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fiddler.formats.packed import Code, Packed
from fiddler.gpu.stack import PackedStack
from tests.formats.blocks import RUNS, blocks
from tests.gpu.quantised import IN_BLOCKS, Quantisation, in_slots
from tests.gpu.test_slots import DEVICE, TOLERANCE, Kind, Sizes, kind_of
from tests.support.covering import covering

pytest.importorskip("triton")

from fiddler.gpu import triton_decode, triton_kernels, triton_packed
from fiddler.gpu.triton_decode import decode
from fiddler.gpu.triton_ggml import block_tile
from fiddler.gpu.triton_tiles import Tile
from tests.gpu.test_triton_kernels import COUNTS, INTERPRETED, widen_dots

DTYPES = list(TOLERANCE)
GATE_AND_UP = {"ungated": False, "joined": False, "interleaved": False, "apart": True, "gelu": True}
"""Whether gate and up are two matrices."""
FORMULAS = {"joined": "swiglu", "interleaved": "own", "apart": "swiglu"}
SIDES = {"up": (1, None), "down": (None, 3), "both": (2, 1)}
"""Blocks to a row of the up and of the down matrix; `None` for rows that are not of blocks, and odd in number."""
LARGE = 256
"""Columns of a large block; the interpreter is slow at two matrices of those."""
ODD = 11


def columns_of(code: Code) -> int:
    assert code.run is not None
    return code.run.columns


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, for the interpreter takes a while for each number it sums up, and products of bfloat16."""
    torch.manual_seed(0)
    if INTERPRETED:
        monkeypatch.setattr(triton_kernels, "block_tile", lambda most, _: Tile(1 if most <= 1 else 4, 8, 128))
        monkeypatch.setattr(triton_packed, "packed_tile", lambda most, _: Tile(1 if most <= 1 else 4, 8, 8))
        monkeypatch.setattr(triton_decode, "TILE_OUT", 8)
        widen_dots(monkeypatch)


def sized(quantisation: Quantisation, side: str) -> Sizes:
    hidden, inner = (ODD if n is None else n * columns_of(quantisation.code) for n in SIDES[side])
    return Sizes(hidden, inner, n_slots=3)


def kind(gate_and_up: str, bias: bool) -> Kind:
    return kind_of(FORMULAS.get(gate_and_up, gate_and_up), GATE_AND_UP[gate_and_up], bias, False, False)


@pytest.mark.parametrize(
    ("quantisation", "side", "gate_and_up", "bias", "dtype", "counts"),
    covering(
        IN_BLOCKS,
        SIDES,
        GATE_AND_UP,
        (False, True),
        DTYPES,
        COUNTS,
        where=lambda quantisation, side, *_: side != "both" or columns_of(quantisation.code) < LARGE,
    ),
    ids=str,
)
@torch.inference_mode()
def test_equals_one_expert_at_a_time(
    quantisation: Quantisation, side: str, gate_and_up: str, bias: bool, dtype: torch.dtype, counts: str
) -> None:
    layer = in_slots(quantisation, kind(gate_and_up, bias), sized(quantisation, side), dtype)
    assert any(isinstance(m, PackedStack) and m.scales is None for m in (*layer.stack.up, layer.stack.down))
    layer.check("triton", COUNTS[counts])


@pytest.mark.parametrize("counts", [[1], [17]], ids=["one row", "more than a tile"])
@pytest.mark.parametrize("quantisation", IN_BLOCKS, ids=str)
def test_with_tiles_as_a_gpu_has_them(
    quantisation: Quantisation, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "block_tile", block_tile)
    sizes = Sizes(sized(quantisation, "up").hidden, ODD, n_slots=1)
    in_slots(quantisation, kind("joined", bias=False), sizes, torch.float16).check("triton", counts)


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize(("code", "dtype"), covering(RUNS, DTYPES), ids=str)
def test_decodes_what_torch_does(code: Code, dtype: torch.dtype, n_blocks: int) -> None:
    matrices = [
        matrix(code, blocks(code, (ODD, n_blocks * columns_of(code)), seed), 0.3 + seed) for seed in range(3)
    ]
    made = decode(stacked(matrices), torch.tensor([2, 0], dtype=torch.int32, device=DEVICE), (2, 0), dtype).cpu()
    expected = torch.stack([matrices[slot].dense(dtype) for slot in (2, 0)])
    assert made.stride(1) * dtype.itemsize % 16 == 0
    if dtype == torch.bfloat16 and INTERPRETED:  # the interpreter cuts bits of bfloat16 off where a GPU rounds
        assert torch.allclose(made.float(), expected.float(), rtol=2**-7)
    else:
        assert torch.equal(made, expected)


def test_every_scale_of_mxfp4_is_decoded_to_the_bit() -> None:
    rows = blocks(Code.MXFP4, (256, 32))
    rows[:, 0] = torch.arange(256)
    agrees(matrix(Code.MXFP4, rows))


@pytest.mark.parametrize("code", [code for code in RUNS if code is not Code.MXFP4])
def test_float16_scales_of_all_kinds_are_decoded_to_the_bit(code: Code) -> None:
    scales = torch.tensor([0.0, -0.0, 6e-8, -6e-5, 65504.0, torch.inf, -torch.inf, torch.nan]).half()
    rows = blocks(code, (len(scales), columns_of(code)))
    at = 208 if code is Code.Q6_K else 0
    rows[:, at : at + 2] = scales[:, None].view(torch.uint8)
    agrees(matrix(code, rows))


def agrees(matrix: Packed) -> None:
    """Hold a decoded matrix against torch's; NaNs and infinities count as numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        (made,) = decode(stacked([matrix]), torch.zeros(1, dtype=torch.int32, device=DEVICE), (0,), torch.float32)
    assert torch.equal(made.cpu().nan_to_num(9e9), matrix.dense(torch.float32).nan_to_num(9e9))


def matrix(code: Code, rows: Tensor, factor: float = 1.0) -> Packed:
    assert code.run is not None
    shape = len(rows), rows.shape[1] // code.run.nbytes * code.run.columns
    return Packed(code, rows, None, shape, (1, code.run.group), factor=factor)


def stacked(matrices: list[Packed]) -> PackedStack:
    """Return matrices of one shape in slots of their own."""
    first = matrices[0]
    codes = torch.stack([matrix.codes for matrix in matrices]).to(DEVICE)
    factors = torch.tensor([matrix.factor for matrix in matrices], dtype=torch.float32, device=DEVICE)
    return PackedStack(first.code, codes, None, None, factors, first.shape, first.block)
