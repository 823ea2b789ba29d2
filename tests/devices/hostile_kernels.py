"""Runs our kernels on odd shapes and on matrices that are not what they say; for a sanitizer to watch.

python -m tests.devices.hostile_kernels LIBRARY …
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
    if code.run:
        return Packed(code, exact(out, code.width(columns)), None, shape, (1, code.run.group))
    grid = -(-out // block[0]), -(-columns // block[1])
    scales = exact(grid[0], grid[1] * scale.itemsize).view(scale)
    codes = exact(out, -(-columns * code.bits // 8))
    return Packed(code, codes, scales, shape, block, exact(*grid) if zeros else None)


def filled(code: Code, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the next larger shape whose rows and columns a code's blocks fill."""
    step = code.run.columns if code.run else 1
    return -(-shape[0] // step) * step, -(-shape[1] // step) * step


def main(library: Path) -> None:
    ours = Native(library.read_bytes(), library)
    for at, (code, size, block) in enumerate(product(Code, SHAPES, BLOCKS)):
        if code.run and block != BLOCKS[0]:
            continue
        scale = SCALES[at % len(SCALES)]
        shape = size[0], filled(code, size)[1]
        for zeros in (False, True) if code in MIDDLE else (False,):
            one = matrix(code, scale, shape, block, zeros)
            for n_rows in (1, 3, 17):
                ours.matmul(torch.randn(n_rows, shape[1]).bfloat16(), one, None)
            ours.dense(one)
    for code, size, activation in product(Code, SHAPES, Activation):
        inner, hidden = filled(code, size)
        gate = Gate(activation, interleaved=activation is Activation.SIGMOID, limit=7.0, shift=1.0)
        up, down = (
            matrix(code, SCALES[1], shape, (3, 16), False) for shape in ((2 * inner, hidden), (hidden, inner))
        )
        bias = torch.randn(2 * inner).bfloat16()
        for own in (ExpertWeights((up,), down, (bias,)), ExpertWeights((up,), down)):
            rows = torch.randn(20, hidden).bfloat16()
            loads = [Load(0, 0, 1), Load(1, 1, 20)]
            ours.experts(loads, [Outline.of(own, gate)] * 2, rows, torch.empty_like(rows))
    lie(ours)


def lie(ours: Native) -> None:
    """The kernels refuse what would be read outside of a matrix, even where Python has not looked."""
    codes = matrix(Code.FP4, SCALES[4], (8, 64), (1, 32), False)
    assert codes.scales is not None
    lies: list[tuple[Packed, str, object]] = [
        (codes, "shape", (9, 64)),
        (codes, "shape", (8, 66)),
        (codes, "block", (1, 16)),
        (codes, "codes", codes.codes[:7]),
        (codes, "codes", codes.codes[:, :31]),
        (codes, "scales", codes.scales[:7]),
        (codes, "scales", codes.scales[:, :1]),
    ]
    for code in (code for code in Code if code.run):
        blocks = matrix(code, SCALES[0], (8, 256), (1, 1), False)
        lies += [(blocks, "shape", shape) for shape in ((9, 256), (8, 512), (8, 255))]
        lies += [(blocks, "codes", part) for part in (blocks.codes[:7], blocks.codes[:, :-1])]
    for honest, field, value in lies:
        liar = honest.with_parts(honest.parts)
        object.__setattr__(liar, field, value)
        try:
            ours.matmul(torch.randn(1, liar.shape[1]).bfloat16(), liar, None)
        except ValueError:
            continue
        raise AssertionError(f"{honest.code}: {field} {value} was taken")


if __name__ == "__main__":
    for library in sys.argv[1:]:
        main(Path(library))
        print("done")
