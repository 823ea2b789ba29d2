"""Random blocks of GGUF files: every byte of codes is one, and scales are numbers that a sum can hold."""

import torch
from torch import Tensor

from fiddler.formats import ggml
from fiddler.formats.packed import Code, Packed

RUNS = [code for code in Code if code.run]
"""Codes that have their scales beside them."""
FLOATS = {"q4_0": (0,), "q8_0": (0,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
"""Where blocks have float16 numbers."""


def blocks(code: Code, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return the rows of a matrix `[out, in]` as bytes, with numbers of about one."""
    (out, columns), run = shape, ggml.BLOCKS[code.value]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 256, (out, columns // run.columns, run.nbytes), generator=generator, dtype=torch.uint8)
    for at in FLOATS.get(code.value, ()):
        size = 1e-3 if run.columns > 32 else 0.1
        scales = (torch.rand(out, rows.shape[1], 1, generator=generator) - 0.3).mul(size).half()
        rows[..., at : at + 2] = scales.view(torch.uint8)
    if code is Code.MXFP4:
        rows[..., :1] = torch.randint(122, 128, (out, rows.shape[1], 1), generator=generator, dtype=torch.uint8)
    return rows.flatten(1)


def in_blocks(code: Code, shape: tuple[int, int], seed: int = 0) -> Packed:
    """Return a matrix of random blocks."""
    return Packed(code, blocks(code, shape, seed), None, shape, (1, ggml.BLOCKS[code.value].group))
