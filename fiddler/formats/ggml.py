"""Blocks of GGUF files: a row is a run of blocks, each with codes and their scales (ggml-common.h of llama.cpp).

Codes of 4 bits lie by halves: the low nibbles of some bytes are neighbours, and so are the high ones. A type of the
K family has blocks of 256 columns with a float16 scale for scales of 6 or 8 bits.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Columns of a block, its bytes, and the columns that share a scale."""

    columns: int
    nbytes: int
    group: int


BLOCKS: Mapping[str, Block] = {
    "q4_0": Block(32, 18, 32),
    "q8_0": Block(32, 34, 32),
    "mxfp4": Block(32, 17, 32),
    "q4_k": Block(256, 144, 32),
    "q5_k": Block(256, 176, 32),
    "q6_k": Block(256, 210, 16),
}
"""By a type's name."""


def numbers(kind: str, rows: Tensor) -> Tensor:
    """Return rows of blocks, uint8 `[out, bytes]`, as numbers: float32 `[out, in]`."""
    blocks = rows.unflatten(1, (-1, BLOCKS[kind].nbytes))
    return _NUMBERS[kind](blocks).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_halves(blocks[..., 2:]).float() - 8.0) * _float16(blocks, 0)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].contiguous().view(torch.int8).float() * _float16(blocks, 0)


def _mxfp4(blocks: Tensor) -> Tensor:
    codes = _halves(blocks[..., 1:]).int()
    bits = ((codes & 8) << 12) | ((codes & 7) << 9)  # e2m1 within float16, whose exponents have 14 more for zero
    values = bits.to(torch.int16).view(torch.float16).float() * 2.0**14
    return values * blocks[..., :1].contiguous().view(torch.float8_e8m0fnu).float()


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(blocks, _halves(blocks[..., 16:].unflatten(-1, (4, 32))))


def _q5_k(blocks: Tensor) -> Tensor:
    """The fifth bits lie in 32 bytes, a bit of each byte for each group of 32 columns."""
    fifth = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None] & 1
    fourth = _halves(blocks[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    return _scaled(blocks, fourth | fifth << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    """Each half has 64 bytes of low bits by halves, and 32 bytes of high bits by quarters."""
    low = _halves(blocks[..., :128].unflatten(-1, (2, 64)))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-2)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float() * _float16(blocks, 208)
    values = (low | high << 4).float() - 32.0
    groups: Tensor = values.flatten(-2).unflatten(-1, (16, 16))
    return (groups * scales[..., None]).flatten(-2)


_NUMBERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0,
    "q8_0": _q8_0,
    "mxfp4": _mxfp4,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def _scaled(blocks: Tensor, codes: Tensor) -> Tensor:
    """Return codes by eight groups of 32, scaled, less their groups' minima.

    Of 12 bytes of scales, the first four hold the scales of groups 0 to 3 in their low six bits, the next four the
    minima of these groups; the last four the low bits of the others, whose upper two are those above the six.
    """
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=-1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=-1)
    scale, minimum = scales.float() * _float16(blocks, 0), minima.float() * _float16(blocks, 2)
    groups: Tensor = codes.flatten(-2).unflatten(-1, (8, 32)).float()
    return (groups * scale[..., None] - minimum[..., None]).flatten(-2)


def _halves(codes: Tensor) -> Tensor:
    """Return the low nibbles of a run of bytes, then the high ones."""
    return torch.cat((codes & 15, codes >> 4), dim=-1)


def _float16(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()
