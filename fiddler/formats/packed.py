"""A quantised matrix in the one form that everything computes with: codes and their scales, as they are published.

A number is `(value - zero) * scale * factor`, of a code's `value`. Formats differ in the code, in the block that
shares a scale, and in the scales' own numbers; a reader of a format only makes views of these. GGUF has codes and
scales in one run of bytes: such a matrix has no `scales`, and `formats.ggml` says what the bytes are.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from fiddler.formats import ggml


class Code(Enum):
    """The codes' values: those of 4 bits lie two to a byte, the even column in the low half."""

    INT4 = "int4"
    """0 to 15, less 8 where there are no zeros."""
    FP4 = "fp4"
    """Sign, two bits of exponent, one of mantissa: e2m1 (OCP Microscaling Formats 1.0, section 5.3.3)."""
    NF4 = "nf4"
    """Quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E)."""
    INT8 = "int8"
    """Bytes with a sign."""
    UINT8 = "uint8"
    """0 to 255, less 128 where there are no zeros."""
    FP8 = "fp8"
    """Sign, four bits of exponent, three of mantissa, no infinity: e4m3 (OCP 8-bit Floating Point 1.0)."""
    Q4_0 = "q4_0"
    """This and those below are GGUF's blocks of codes and scales; rows of them are rows of bytes."""
    Q8_0 = "q8_0"
    MXFP4 = "mxfp4"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"

    @property
    def bits(self) -> int:
        """Bits of a code, without its share of a scale."""
        if self.run is not None:
            return self.run.nbytes * 8 // self.run.columns
        return 4 if self in VALUES else 8

    @property
    def run(self) -> ggml.Block | None:
        """The block of a code that has its scales beside it."""
        return ggml.BLOCKS.get(self.value)

    def width(self, columns: int) -> int:
        """Return the bytes of a row of codes. Raises `ValueError` where blocks do not fill it."""
        if self.run is None:
            return -(-columns * self.bits // 8)
        if columns % self.run.columns:
            raise ValueError(
                f"rows of {columns} columns are not filled by {self.value}'s blocks of {self.run.columns}"
            )
        return columns // self.run.columns * self.run.nbytes


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES: dict[Code, tuple[float, ...]] = {
    Code.INT4: tuple(map(float, range(16))),
    Code.FP4: (*_E2M1, *(-value for value in _E2M1)),
    Code.NF4: (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}
"""Values of the 16 codes of 4 bits, in order."""
MIDDLE = {Code.INT4: 8.0, Code.UINT8: 128.0}
"""The zero of unsigned codes that have none of their own."""
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e8m0fnu)
"""The scales' own numbers; `float8_e8m0fnu` are powers of two."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix `[out, in]` of codes, as views: nothing of it is ever expanded but by `dense`.

    Rows may have gaps between them, a row has none. Raises `ValueError` for parts that do not belong together.
    """

    code: Code
    codes: Tensor
    """uint8 `[out, code.width(in)]`: two codes of 4 bits (the last may be half used), one of 8, or blocks."""
    scales: Tensor | None
    """`[⌈out / block rows⌉, ⌈in / block columns⌉]` of a dtype of `SCALES`; `None` where blocks hold them."""
    shape: tuple[int, int]
    """(out, in)."""
    block: tuple[int, int]
    """(rows, columns) that share a scale; the last blocks may be smaller."""
    zeros: Tensor | None = None
    """uint8, of the scales' shape: the value that stands for zero, of INT4 and UINT8 alone."""
    factor: float = 1.0
    """Multiplies every number."""
    nbytes: int = field(init=False)
    """Bytes read when the matrix is multiplied."""

    def __post_init__(self) -> None:
        (out, columns), (block_rows, block_columns) = self.shape, self.block
        if min(out, columns, block_rows, block_columns) < 1:
            raise ValueError(f"a matrix of {self.shape} in blocks of {self.block}")
        _expect("codes", self.codes, (out, self.code.width(columns)), (torch.uint8,))
        if (self.scales is None) != (self.code.run is not None):
            raise ValueError(f"{self.code.value} has scales where it needs none, or needs them")
        grid = -(-out // block_rows), -(-columns // block_columns)
        if self.scales is not None:
            _expect("scales", self.scales, grid, SCALES)
        if self.zeros is not None:
            if self.code not in MIDDLE:
                raise ValueError(f"{self.code.value} has no zeros of its own")
            _expect("zeros", self.zeros, grid, (torch.uint8,))
        object.__setattr__(self, "nbytes", sum(part.nbytes for part in self.parts))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Every tensor of it."""
        return tuple(part for part in (self.codes, self.scales, self.zeros) if part is not None)

    def with_parts(self, parts: tuple[Tensor, ...]) -> "Packed":
        """Return the same matrix whose `parts` lie elsewhere."""
        return self._of(parts, self.shape)

    def rows(self, start: int, step: int = 1) -> "Packed":
        """Return every `step`-th row from `start`. Raises `ValueError` where rows share scales."""
        if self.block[0] != 1:
            raise ValueError(f"{self.block[0]} rows share a scale, so they cannot be taken apart")
        parts = tuple(part[start::step] for part in self.parts)
        return self._of(parts, (len(parts[0]), self.shape[1]))

    def between(self, start: int, stop: int) -> "Packed":
        """Return rows `start … stop-1`; `start` must be the first row of a block."""
        rows, (codes, *grids) = self.block[0], self.parts
        codes, grid = codes[start:stop], slice(start // rows, -(-stop // rows))
        return self._of((codes, *(each[grid] for each in grids)), (len(codes), self.shape[1]))

    def beside(self, other: "Packed") -> "Packed | None":
        """Return this matrix with another below it, which lies behind it in memory; `None` where it does not."""
        ours, theirs = (
            (each.code, each.block, each.factor, each.shape[1], len(each.parts)) for each in (self, other)
        )
        if ours != theirs or self.shape[0] % self.block[0]:
            return None
        joined = [_joined(*pair) for pair in zip(self.parts, other.parts, strict=True)]
        parts = tuple(part for part in joined if part is not None)
        if len(parts) != len(joined):
            return None
        return self._of(parts, (self.shape[0] + other.shape[0], self.shape[1]))

    def _of(self, parts: tuple[Tensor, ...], shape: tuple[int, int]) -> "Packed":
        codes, scales, zeros = parts[0], *(*parts[1:], None, None)[:2]
        return replace(self, codes=codes, scales=scales, zeros=zeros, shape=shape)

    def values(self) -> Tensor:
        """Return the codes' values, float32 `[out, in]`, before zeros and scales."""
        if self.code.bits == 4:
            table = _table(self.code, self.codes.device)
            pairs = torch.stack((self.codes & 15, self.codes >> 4), dim=-1)
            return table[pairs.flatten(1)[:, : self.shape[1]].int()]
        kinds = {Code.INT8: torch.int8, Code.FP8: torch.float8_e4m3fn}
        return self.codes.view(kinds.get(self.code, torch.uint8)).float()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix `[out, in]`, computed in float32 and rounded once."""
        if self.scales is None:
            return ggml.numbers(self.code.value, self.codes).mul_(self.factor).to(dtype)
        numbers = self.values()
        if self.code in MIDDLE:
            numbers -= MIDDLE[self.code] if self.zeros is None else self._spread(self.zeros.float())
        return numbers.mul_(self._spread(self.scales.float() * self.factor)).to(dtype)

    def _spread(self, grid: Tensor) -> Tensor:
        """Return a number per block as one per column and row."""
        (out, columns), (rows, across) = self.shape, self.block
        grid = grid.repeat_interleave(rows, 0)[:out] if grid.shape[0] > 1 and rows > 1 else grid
        return grid.repeat_interleave(across, 1)[:, :columns] if grid.shape[1] > 1 else grid


@lru_cache
def _table(code: Code, device: torch.device) -> Tensor:
    """Return the values of codes of 4 bits; kept, since a GPU's graph may not copy them from the host."""
    with torch.inference_mode(False):
        return torch.tensor(VALUES[code], dtype=torch.float32, device=device)


Matrix = Tensor | Packed
"""A matrix `[out, in]` to multiply by."""


def tensors(matrix: Matrix) -> tuple[Tensor, ...]:
    """Return the tensors that a matrix is made of."""
    return matrix.parts if isinstance(matrix, Packed) else (matrix,)


def kind(matrix: Matrix) -> str:
    """Return how a matrix's numbers are stored, for messages and as a key of measurements."""
    if isinstance(matrix, Tensor):
        return str(matrix.dtype)
    if matrix.scales is None:
        return matrix.code.value
    scales = str(matrix.scales.dtype).removeprefix("torch.")
    zeros = "" if matrix.zeros is None else " with zeros"
    return f"{matrix.code.value}{zeros} in {matrix.block} of {scales}"


def _joined(first: Tensor, second: Tensor) -> Tensor | None:
    """Return two tensors of rows that lie back to back in memory as one view."""
    adjacent = first.data_ptr() + first.nbytes == second.data_ptr() and first.dtype == second.dtype
    one = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if not (adjacent and one and first.is_contiguous() and second.is_contiguous()):
        return None
    return first.as_strided((len(first) + len(second), first.shape[1]), (first.shape[1], 1))


def _expect(name: str, tensor: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or (shape[1] > 1 and tensor.stride(1) != 1):
        due = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)} where {due} {list(shape)} are due")
