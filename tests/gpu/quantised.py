"""Random quantised experts: every code with every kind of scale, and blocks that do and do not divide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from fiddler.devices.formula import ExpertFormula
from fiddler.formats.packed import MIDDLE, SCALES, VALUES, Code, Packed
from fiddler.gpu.stack import Stack
from fiddler.store.layout import ALIGNMENT, BlockLayout
from fiddler.types import ExpertWeights
from tests.formats.blocks import RUNS, in_blocks
from tests.gpu.test_slots import DEVICE, Kind, Layer, Sizes

WHOLE = 1 << 20
"""More than any side."""


@dataclass(frozen=True)
class Quantisation:
    """What varies between quantised matrices."""

    code: Code
    scales: torch.dtype | None
    """`None` for blocks that hold theirs."""
    zeros: bool = False
    block: tuple[int, int] = (1, 4)

    def __str__(self) -> str:
        if self.scales is None:
            return self.code.value
        scales = str(self.scales).removeprefix("torch.")
        return f"{self.code.value}-{scales}{'-zeros' if self.zeros else ''}-{self.block[0]}x{self.block[1]}"

    def matrix(self, out: int, columns: int) -> Packed:
        """Return a random matrix, of numbers whose products with rows are about as large as these.

        Rows that GGUF's blocks do not fill are of bytes, as a GGUF file has them of another type.
        """
        if self.scales is None:
            return self._of_blocks(out, columns)
        block = min(self.block[0], out), min(self.block[1], columns)
        width = -(-columns * self.code.bits // 8)
        codes = torch.randint(256, (out, width), dtype=torch.uint8)
        if self.code is Code.FP8:
            codes = torch.where((codes & 0x7F) == 0x7F, codes - 1, codes)
        grid = -(-out // block[0]), -(-columns // block[1])
        zeros = torch.randint(1 << self.code.bits, grid, dtype=torch.uint8) if self.zeros else None
        scales = torch.randint(-2, 2, grid).float().exp2() * (1.0 + torch.rand(grid) / 2)
        factor = 1.0 / (self.largest * columns**0.5)
        return Packed(self.code, codes, scales.to(self.scales), (out, columns), block, zeros, factor)

    def _of_blocks(self, out: int, columns: int) -> Packed:
        run, seed = self.code.run, int(torch.randint(1 << 30, ()))
        assert run is not None
        if columns % run.columns:
            return Quantisation(Code.INT8, torch.float32).matrix(out, columns)
        factor = (0.5 + seed / (1 << 30)) / columns**0.5
        return replace(in_blocks(self.code, (out, columns), seed), factor=factor)

    @property
    def largest(self) -> float:
        """The magnitude of the codes' largest value, roughly."""
        if self.code in VALUES:
            return 8.0 if self.code is Code.INT4 else max(VALUES[self.code])
        return 448.0 if self.code is Code.FP8 else 128.0

    def expert(self, kind: Kind, sizes: Sizes) -> ExpertWeights:
        """Return a random expert of a kind that is not transposed."""
        hidden, inner = sizes.hidden, sizes.inner
        outs = (inner,) * 2 if kind.split else (2 * inner,) if kind.formula.gated else (inner,)
        biases = tuple(torch.randn(out) for out in outs) if kind.bias else ()
        down_bias = torch.randn(hidden) if kind.bias else None
        up = tuple(self.matrix(out, hidden) for out in outs)
        return ExpertWeights(up, self.matrix(hidden, inner), biases, down_bias)


QUANTISATIONS = [
    Quantisation(code, scales, zeros)
    for code, scales, zeros in product((code for code in Code if not code.run), SCALES, (False, True))
    if not zeros or code in MIDDLE
]
"""Every code with every kind of scale, with and without zeros."""
IN_BLOCKS = [Quantisation(code, None) for code in RUNS]
"""Every type of GGUF's blocks."""
BLOCKS: Sequence[tuple[int, int]] = (
    (1, 1),
    (1, 3),
    (1, 16),
    (1, WHOLE),
    (4, 4),
    (3, 6),
    (WHOLE, WHOLE),
    (WHOLE, 5),
)
"""Odd ones too, in which two columns of a byte have scales of their own."""


def in_slots(
    quantisation: Quantisation, kind: Kind, sizes: Sizes, dtype: torch.dtype, held: Sequence[int] | None = None
) -> Layer:
    """Return experts in an arena, whose other slots, and the gaps between blocks, hold bytes without sense.

    Biases are of the rows' `dtype`, as an engine has them.
    """
    experts = tuple(with_biases(quantisation.expert(kind, sizes), dtype) for _ in range(sizes.n_slots))
    layout = BlockLayout.of(experts[0])
    slots = torch.full((sizes.n_slots, layout.nbytes + ALIGNMENT), 0xFF, dtype=torch.uint8)
    for slot in range(sizes.n_slots) if held is None else held:
        layout.write(experts[slot], slots[slot])
    return Layer(kind, sizes, dtype, tuple(map(decoded, experts)), Stack.over(slots.to(DEVICE), layout))


def with_biases(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    down_bias = None if weights.down_bias is None else weights.down_bias.to(dtype)
    return ExpertWeights(weights.up, weights.down, tuple(bias.to(dtype) for bias in weights.up_bias), down_bias)


def decoded(weights: ExpertWeights) -> ExpertWeights:
    """Return an expert's numbers, in float32."""

    def dense(matrix: Tensor | Packed) -> Tensor:
        return matrix.dense(torch.float32) if isinstance(matrix, Packed) else matrix

    return ExpertWeights(tuple(map(dense, weights.up)), dense(weights.down), weights.up_bias, weights.down_bias)


def every_block(formula: ExpertFormula) -> Iterator[tuple[Quantisation, Kind]]:
    """Yield blocks of all forms, of codes and gates in turn."""
    for i, block in enumerate(BLOCKS):
        for code, zeros in ((Code.INT4, True), (Code.FP4, False), (Code.FP8, False)):
            kind = Kind(formula, "swiglu", split=bool(i % 2), bias=code is Code.INT4)
            yield Quantisation(code, torch.bfloat16, zeros, block), kind
