"""Runs our kernels on odd shapes and on matrices that are not what they say; for a sanitizer to watch.

python -m tests.devices.hostile_kernels LIBRARY
"""

import sys
from itertools import product
from pathlib import Path

import torch

from fiddler.devices.gates import Activation, Gate
from fiddler.devices.native import Native
from fiddler.devices.outline import Outline
from fiddler.formats.packed import MIDDLE, SCALES, Code, Packed
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

SHAPES = ((1, 1), (1, 33), (3, 15), (7, 31), (9, 127), (5, 129), (130, 65))
BLOCKS = ((1, 16), (1, 32), (128, 128), (2, 7), (1, 1 << 20), (1, 1), (4, 24))


def exact(*shape: int, high: int = 256) -> torch.Tensor:
    """Return bytes that end where their memory ends."""
    return torch.randint(0, high, shape, dtype=torch.uint8).clone()


def matrix(code: Code, scale: torch.dtype, shape: tuple[int, int], block: tuple[int, int], zeros: bool) -> Packed:
    """Return a matrix of any bytes, no numbers and absurd zeros among them."""
    out, columns = shape
    grid = -(-out // block[0]), -(-columns // block[1])
    scales = exact(grid[0], grid[1] * scale.itemsize).view(scale)
    codes = exact(out, -(-columns * code.bits // 8))
    return Packed(code, codes, scales, shape, block, exact(*grid) if zeros else None)


def main(library: Path) -> None:
    ours = Native(library.read_bytes(), library)
    for at, (code, shape, block) in enumerate(product(Code, SHAPES, BLOCKS)):
        scale = SCALES[at % len(SCALES)]
        for zeros in (False, True) if code in MIDDLE else (False,):
            one = matrix(code, scale, shape, block, zeros)
            for n_rows in (1, 3, 17):
                ours.matmul(torch.randn(n_rows, shape[1]).bfloat16(), one, None)
            ours.dense(one)
    for code, (inner, hidden), activation in product(Code, SHAPES, Activation):
        gate = Gate(activation, interleaved=activation is Activation.SIGMOID, limit=7.0, shift=1.0)
        up, down = (
            matrix(code, SCALES[1], size, (3, 16), False) for size in ((2 * inner, hidden), (hidden, inner))
        )
        bias = torch.randn(2 * inner).bfloat16()
        for own in (ExpertWeights((up,), down, (bias,)), ExpertWeights((up,), down)):
            rows = torch.randn(20, hidden).bfloat16()
            loads = [Load(0, 0, 1), Load(1, 1, 20)]
            ours.experts(loads, [Outline.of(own, gate)] * 2, rows, torch.empty_like(rows))
    lie(ours)


def lie(ours: Native) -> None:
    """The kernels refuse what would be read outside of a matrix, even where Python has not looked."""
    honest = matrix(Code.FP4, SCALES[4], (8, 64), (1, 32), False)
    for field, value in (
        ("shape", (9, 64)),
        ("shape", (8, 66)),
        ("block", (1, 16)),
        ("codes", honest.codes[:7]),
        ("codes", honest.codes[:, :31]),
        ("scales", honest.scales[:7]),
        ("scales", honest.scales[:, :1]),
    ):
        liar = matrix(Code.FP4, SCALES[4], (8, 64), (1, 32), False)
        object.__setattr__(liar, field, value)
        try:
            ours.matmul(torch.randn(1, liar.shape[1]).bfloat16(), liar, None)
        except ValueError:
            continue
        raise AssertionError(f"{field} {value} was taken")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("done")
