"""GGUF's blocks, against the numbers that gguf-py makes of them."""

import gguf
import pytest
import torch
from gguf.quants import dequantize

from fiddler.formats import ggml
from fiddler.formats.packed import Code, Packed
from tests.formats.blocks import RUNS, blocks


@pytest.mark.parametrize("code", RUNS)
def test_numbers_are_those_of_gguf_py(code: Code) -> None:
    run = ggml.BLOCKS[code.value]
    rows = blocks(code, (40, 3 * run.columns))
    expected = dequantize(rows.numpy(), gguf.GGMLQuantizationType[code.name])
    matrix = Packed(code, rows, None, (40, 3 * run.columns), (1, run.group))
    assert torch.equal(matrix.dense(torch.float32), torch.from_numpy(expected))
    assert (run.columns, run.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[code.name]]


@pytest.mark.parametrize("code", RUNS)
def test_parts_that_do_not_belong_together_are_refused(code: Code) -> None:
    run = ggml.BLOCKS[code.value]
    rows = blocks(code, (4, run.columns))
    with pytest.raises(ValueError, match="not filled"):
        Packed(code, rows, None, (4, run.columns - 2), (1, run.group))
    with pytest.raises(ValueError, match="codes are"):
        Packed(code, rows[:, 1:], None, (4, run.columns), (1, run.group))
    with pytest.raises(ValueError, match="scales where it needs none"):
        Packed(code, rows, torch.ones(4, 1), (4, run.columns), (1, run.columns))


def test_codes_without_their_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="needs them"):
        Packed(Code.INT4, torch.zeros(4, 16, dtype=torch.uint8), None, (4, 32), (1, 32))


def test_rows_and_parts_of_a_matrix() -> None:
    rows = blocks(Code.Q4_K, (6, 512))
    matrix = Packed(Code.Q4_K, rows, None, (6, 512), (1, 32))
    dense = matrix.dense(torch.float32)
    assert torch.equal(matrix.rows(1, 2).dense(torch.float32), dense[1::2])
    assert torch.equal(matrix.between(2, 5).dense(torch.float32), dense[2:5])
    joined = matrix.between(0, 2).beside(matrix.between(2, 6))
    assert joined is not None
    assert torch.equal(joined.dense(torch.float32), dense)
    assert matrix.nbytes == 6 * 2 * 144


def test_codes_have_the_bits_of_their_name() -> None:
    assert [code.bits for code in RUNS] == [4, 8, 4, 4, 5, 6]
