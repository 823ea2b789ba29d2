"""Our kernels on packed matrices: the numbers are those of `Packed.dense`, and a row's are its own."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.native import MOST_ROWS, Native, native
from fiddler.formats.packed import MIDDLE, SCALES, Code, Packed
from tests.devices.conftest import Build
from tests.formats.blocks import RUNS, in_blocks

pytestmark = pytest.mark.skipif(native() is None, reason="this machine has no gcc")

BUILDS = {"best": [], "portable": ["-DPORTABLE"]}
if torch.cpu.get_capabilities().get("avx2", False):
    BUILDS["avx2"] = ["-DPORTABLE", "-march=x86-64-v3"]
BLOCKS = ((1, 16), (1, 32), (1, 64), (1, 128), (1, 1 << 20), (128, 128), (3, 24), (2, 7), (1, 48), (1, 1))
SHAPES = ((1, 1), (2, 127), (5, 128), (37, 200), (130, 333))
WHOLE = 1 << 20
SEPARATE = [code for code in Code if not code.run]
CASES = [(code, zeros) for code in SEPARATE for zeros in (False, True) if code in MIDDLE or not zeros]


@pytest.fixture(scope="module", params=list(BUILDS))
def ours(request: pytest.FixtureRequest, build: Build) -> Native:
    """The kernels as this machine gets them, in compilers' vectors, and in those of AVX2."""
    return build(*BUILDS[request.param])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def packed(
    code: Code,
    shape: tuple[int, int],
    scale: torch.dtype = torch.float32,
    block: tuple[int, int] = (1, 32),
    *,
    zeros: bool = False,
    seed: int = 0,
    factor: float = 0.7,
) -> Packed:
    """Return a matrix of every code there is, but none that is no number."""
    generator, (out, columns) = torch.Generator().manual_seed(seed), shape
    codes = torch.randint(0, 256, (out, -(-columns * code.bits // 8)), generator=generator, dtype=torch.uint8)
    if code is Code.FP8:
        codes[(codes & 127) == 127] = 3
    grid = -(-out // block[0]), -(-columns // block[1])
    if scale == torch.float8_e8m0fnu:
        scales = torch.randint(118, 130, grid, generator=generator, dtype=torch.uint8).view(scale)
    else:
        scales = (torch.rand(grid, generator=generator) - 0.3).to(scale)
    kept = torch.randint(0, 2**code.bits, grid, generator=generator, dtype=torch.uint8) if zeros else None
    return Packed(code, codes, scales, shape, block, kept, factor)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_product(found: Tensor, x: Tensor, matrix: Packed, bias: Tensor | None = None) -> None:
    """Within float32's rounding of the sums' terms, and one rounding to bfloat16."""
    dense, wide = matrix.dense(torch.float32), x.float()
    terms = dense.abs()
    if matrix.code in (Code.Q4_K, Code.Q5_K):  # code and minimum are summed apart
        terms = terms + 2 * terms.amax()
    if matrix.zeros is not None and matrix.scales is not None:  # value and zero are summed apart
        terms = (
            terms
            + 2
            * (matrix._spread(matrix.scales.float() * matrix.factor) * matrix._spread(matrix.zeros.float())).abs()
        )
    expected = wide @ dense.T + (0 if bias is None else bias.float())
    allowed = expected.abs() * 2**-8 + (wide.abs() @ terms.T) * 2e-6 + 1e-30
    assert ((found.float() - expected).abs() <= allowed).all()


class TestProduct:
    @pytest.mark.parametrize(("code", "zeros"), CASES)
    @pytest.mark.parametrize("scale", SCALES)
    def test_is_that_of_the_dense_matrix(self, ours: Native, code: Code, zeros: bool, scale: torch.dtype) -> None:
        for at, (block, shape) in enumerate(product(BLOCKS, SHAPES)):
            matrix = packed(code, shape, scale, block, zeros=zeros, seed=at)
            x = random(1 + at % 9, shape[1], seed=at)
            assert_product(ours.matmul(x, matrix, None), x, matrix)

    @pytest.mark.parametrize("code", RUNS)
    def test_is_that_of_a_matrix_in_blocks(self, ours: Native, code: Code) -> None:
        for at, (out, n_blocks) in enumerate(((1, 1), (2, 3), (5, 4), (37, 9), (130, 5))):
            matrix = in_blocks(code, (out, n_blocks * code.run.columns), seed=at)
            for n_rows in (1, 2, 3, 5, 16, 23):
                x = random(n_rows, matrix.shape[1], seed=at)
                assert_product(ours.matmul(x, matrix, None), x, matrix)

    @pytest.mark.parametrize(("code", "zeros"), CASES)
    def test_of_every_number_of_rows(self, ours: Native, code: Code, zeros: bool) -> None:
        matrix, bias = packed(code, (70, 2048 + 32), zeros=zeros), random(70, seed=9)
        for n_rows in (1, 2, 3, 4, 5, 16, 17, MOST_ROWS):
            x = random(n_rows, matrix.shape[1], seed=n_rows)
            assert_product(ours.matmul(x, matrix, bias), x, matrix, bias)

    @pytest.mark.parametrize(("code", "zeros"), [*CASES, *((code, False) for code in RUNS)])
    @pytest.mark.usefixtures("threads")
    def test_a_row_is_its_own_whatever_runs_beside_it(self, ours: Native, code: Code, zeros: bool) -> None:
        matrix = in_blocks(code, (300, 768)) if code.run else packed(code, (300, 544), zeros=zeros)
        x = random(21, matrix.shape[1])
        together = ours.matmul(x, matrix, None)
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            for i in range(0, 21, 5):
                assert torch.equal(ours.matmul(x[i : i + 1], matrix, None)[0], together[i])

    def test_every_code_is_exact(self, ours: Native) -> None:
        """One column, so one product: every byte, subnormal numbers and what is none among them."""
        every = torch.arange(256, dtype=torch.uint8)[:, None]
        for code in (Code.FP8, Code.INT8, Code.UINT8):
            matrix = Packed(code, every, torch.ones(1, 1), (256, 1), (WHOLE, WHOLE))
            found = ours.matmul(torch.ones(1, 1).bfloat16(), matrix, None)[0].float()
            expected = matrix.dense(torch.float32)[:, 0]
            assert torch.equal(found.nan_to_num(999.0), expected.nan_to_num(999.0))

    def test_every_scale_is_exact(self, ours: Native) -> None:
        bits = torch.arange(256, dtype=torch.uint8)
        for dtype, codes in ((torch.float8_e8m0fnu, 0x38), (torch.float8_e4m3fn, 0x38)):
            matrix = Packed(
                Code.FP8,
                torch.full((256, 1), codes, dtype=torch.uint8),
                bits.view(dtype)[:, None],
                (256, 1),
                (1, 1 << 9),
            )
            found = ours.matmul(torch.ones(1, 1).bfloat16(), matrix, None)[0]
            expected = matrix.dense(torch.float32).bfloat16()[:, 0]
            assert torch.equal(found.float().nan_to_num(999.0), expected.float().nan_to_num(999.0))

    def test_of_a_float16_scale_s_subnormal_numbers(self, ours: Native) -> None:
        bits = torch.arange(0, 0x7C00, 31, dtype=torch.int16)
        scales = bits.view(torch.float16)[:, None]
        matrix = Packed(Code.INT8, torch.ones(len(bits), 1, dtype=torch.uint8), scales, (len(bits), 1), (1, WHOLE))
        found = ours.matmul(torch.ones(1, 1).bfloat16(), matrix, None)[0]
        assert torch.equal(found, scales[:, 0].float().bfloat16())

    def test_a_scale_that_is_no_number_leaves_other_rows_alone(self, ours: Native) -> None:
        matrix = packed(Code.FP4, (12, 256))
        matrix.scales[5, 3] = torch.nan
        found = ours.matmul(random(2, 256), matrix, None)
        assert found[:, 5].isnan().all()
        assert not found[:, [*range(5), *range(6, 12)]].isnan().any()

    def test_rows_may_have_gaps(self, ours: Native) -> None:
        dense = packed(Code.INT4, (40, 256), zeros=True)
        wide = [torch.nn.functional.pad(part, (0, 13)) for part in dense.parts]
        gaps = dense.with_parts(tuple(part[:, : own.shape[1]] for part, own in zip(wide, dense.parts, strict=True)))
        x = random(3, 256)
        assert torch.equal(ours.matmul(x, gaps, None), ours.matmul(x, dense, None))

    def test_many_rows_are_those_of_the_matrix_in_bfloat16(self, ours: Native) -> None:
        matrix, x = packed(Code.INT4, (40, 256)), random(MOST_ROWS + 1, 256)
        assert torch.equal(ours.matmul(x, matrix, None), F.linear(x, ours.dense(matrix)))

    def test_other_rows_are_torch_s(self, ours: Native) -> None:
        matrix, x = packed(Code.INT4, (40, 256)), random(2, 256).float()
        assert torch.equal(ours.matmul(x, matrix, None), F.linear(x, matrix.dense(torch.float32)))
        with pytest.raises(ValueError, match="255 wide"):
            ours.matmul(random(2, 255), matrix, None)


class TestDense:
    @pytest.mark.parametrize(("code", "zeros"), CASES)
    @pytest.mark.parametrize("scale", SCALES)
    def test_is_the_reference(self, ours: Native, code: Code, zeros: bool, scale: torch.dtype) -> None:
        for block, shape in product(BLOCKS, SHAPES):
            matrix = packed(code, shape, scale, block, zeros=zeros)
            assert torch.equal(ours.dense(matrix), matrix.dense(torch.bfloat16))

    @pytest.mark.parametrize("code", RUNS)
    def test_of_blocks_is_the_reference(self, ours: Native, code: Code) -> None:
        matrix = in_blocks(code, (37, 3 * code.run.columns))
        assert torch.equal(ours.dense(matrix), matrix.dense(torch.bfloat16))
