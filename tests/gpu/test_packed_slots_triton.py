"""The kernels of quantised experts: in Triton's interpreter where there is no GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.formats.packed import SCALES, Code, Packed
from tests.gpu.quantised import BLOCKS, QUANTISATIONS, Quantisation, every_block, in_slots
from tests.gpu.test_slots import DEVICE, GATED, KINDS, TOLERANCE, Kind, Sizes

pytest.importorskip("triton")

from fiddler.gpu import triton_decode, triton_packed
from fiddler.gpu.stack import PackedStack
from fiddler.gpu.triton_decode import decode
from fiddler.gpu.triton_packed import packed_tile
from fiddler.gpu.triton_tiles import Tile
from tests.gpu.test_triton_kernels import COUNTS, INTERPRETED, widen_dots

PLAIN = [kind for kind in KINDS if not kind.transposed]
SIZES = Sizes(22, 10, n_slots=3)
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, for the interpreter takes a while for each number it sums up, and products of bfloat16."""
    torch.manual_seed(0)
    if INTERPRETED:
        monkeypatch.setattr(triton_packed, "packed_tile", lambda most, _: Tile(1 if most <= 1 else 4, 8, 8))
        monkeypatch.setattr(triton_decode, "TILE_OUT", 8)
        monkeypatch.setattr(triton_decode, "TILE_INNER", 8)
        widen_dots(monkeypatch)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("quantisation", QUANTISATIONS, ids=str)
@torch.inference_mode()
def test_every_code_with_every_scale(quantisation: Quantisation, counts: list[int]) -> None:
    at = QUANTISATIONS.index(quantisation)
    in_slots(quantisation, PLAIN[at % len(PLAIN)], SIZES, DTYPES[at % 3]).check("triton", counts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("kind", PLAIN, ids=str)
@torch.inference_mode()
def test_every_kind(kind: Kind, counts: list[int]) -> None:
    quantisation = QUANTISATIONS[PLAIN.index(kind) * 7 % len(QUANTISATIONS)]
    in_slots(quantisation, kind, SIZES, DTYPES[PLAIN.index(kind) % 3]).check("triton", counts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@torch.inference_mode()
def test_blocks_of_all_forms(counts: list[int]) -> None:
    for quantisation, kind in every_block(GATED["swiglu"]):
        in_slots(quantisation, kind, Sizes(23, 10, n_slots=3), torch.float32).check("triton", counts)


@settings(max_examples=10)
@given(data=st.data())
def test_whatever_the_sizes_and_groups(data: st.DataObject) -> None:
    sizes = Sizes(
        hidden=data.draw(st.integers(1, 18)),
        inner=data.draw(st.integers(1, 18)),
        n_slots=data.draw(st.integers(1, 6)),
        top_k=data.draw(st.integers(1, 5)),
    )
    counts = data.draw(st.lists(st.sampled_from((0, 0, 1, 2, 5)), min_size=sizes.n_slots, max_size=sizes.n_slots))
    drawn = data.draw(st.sampled_from(QUANTISATIONS))
    quantisation = Quantisation(drawn.code, drawn.scales, drawn.zeros, data.draw(st.sampled_from(BLOCKS)))
    kind, dtype = data.draw(st.sampled_from(PLAIN)), data.draw(st.sampled_from(DTYPES))
    held = [slot for slot, count in enumerate(counts) if count]
    in_slots(quantisation, kind, sizes, dtype, held).check("triton", counts)


@pytest.mark.parametrize("counts", [[1], [17]], ids=["one row", "more than a tile"])
@pytest.mark.parametrize("quantisation", [QUANTISATIONS[0], QUANTISATIONS[-1]], ids=str)
def test_with_tiles_as_a_gpu_has_them(
    quantisation: Quantisation, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_packed, "packed_tile", packed_tile)
    wide = Quantisation(quantisation.code, quantisation.scales, quantisation.zeros, (1, 32))
    in_slots(wide, PLAIN[0], Sizes(96, 16, n_slots=1), torch.float16).check("triton", counts)


def stacked(matrix: Packed) -> PackedStack:
    """Return a matrix as a stack of one slot."""
    codes, scales, *zeros = (part[None].to(DEVICE) for part in matrix.parts)
    factors = torch.tensor([matrix.factor], dtype=torch.float32, device=DEVICE)
    return PackedStack(matrix.code, codes, scales, zeros[0] if zeros else None, factors, matrix.shape, matrix.block)


def decoded(matrix: Packed, dtype: torch.dtype) -> torch.Tensor:
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return decode(stacked(matrix), slots, (0,), dtype)[0].cpu()


def every_code(code: Code, scales: torch.Tensor) -> Packed:
    """Return a row of all codes for each of some scales."""
    n = 1 << code.bits
    codes = torch.arange(n, dtype=torch.uint8)
    codes = codes[::2] | codes[1::2] << 4 if code.bits == 4 else codes
    return Packed(code, codes.repeat(len(scales), 1), scales[:, None], (len(scales), n), (1, n))


@pytest.mark.parametrize("code", [code for code in Code if not code.run], ids=lambda code: code.value)
def test_every_code_is_decoded_to_the_bit(code: Code) -> None:
    for kind in SCALES:
        scales = torch.tensor([1.0, 0.25, 3.5, 0.015625]).to(kind)
        matrix = every_code(code, scales)
        assert torch.equal(
            decoded(matrix, torch.float32).nan_to_num(9e9), matrix.dense(torch.float32).nan_to_num(9e9)
        )


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e8m0fnu], ids=str)
def test_every_scale_of_8_bits_is_decoded_to_the_bit(kind: torch.dtype) -> None:
    matrix = every_code(Code.FP4, torch.arange(256, dtype=torch.uint8).view(kind))
    expected = matrix.dense(torch.float32)
    with np.errstate(over="ignore"):  # 6 times 2^127
        assert torch.equal(decoded(matrix, torch.float32).nan_to_num(9e9), expected.nan_to_num(9e9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_what_torch_does(dtype: torch.dtype) -> None:
    for (quantisation, _), columns in zip(every_block(GATED["swiglu"]), (9, 10, 17) * 8, strict=True):
        matrix = quantisation.matrix(11, columns)
        made, expected = decoded(matrix, dtype), matrix.dense(dtype)
        assert made.shape == expected.shape
        assert made.stride(0) * dtype.itemsize % 16 == 0
        # the interpreter cuts bits of bfloat16 off where a GPU rounds
        assert torch.allclose(made.float(), expected.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-7)
