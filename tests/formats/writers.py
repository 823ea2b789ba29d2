"""Writes quantised matrices as publishers do, and decodes them on its own: nothing of our readers is used.

A writer takes a matrix `[out, in]` and returns the tensors that stand in its place, by what their names have after
the module's, and the numbers that they stand for, in float32.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Written = tuple[dict[str, Tensor], Tensor]
Writer = Callable[[Tensor], Written]

FP8_MOST = 448.0


def spread(grid: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    """Return a number per block as one per element."""
    return torch.kron(grid, torch.ones(rows, columns))[: shape[0], : shape[1]]


def largest(w: Tensor, rows: int, columns: int) -> Tensor:
    """Return the largest magnitude of each block, blocks at the edges being smaller."""
    padded = F.pad(w.abs(), (0, -w.shape[1] % columns, 0, -w.shape[0] % rows))
    return F.max_pool2d(padded[None, None], (rows, columns))[0, 0].clamp(min=1e-6)


def fp8(rows: int, columns: int, name: str = "weight_scale_inv", dtype: torch.dtype = torch.float32) -> Writer:
    """FP8 in blocks; 0 stands for the whole side."""

    def write(w: Tensor) -> Written:
        block = rows or w.shape[0], columns or w.shape[1]
        scale = (largest(w, *block) / FP8_MOST).to(dtype)
        wide = spread(scale.float(), *block, w.shape)
        codes = (w / wide).clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
        return {"weight": codes, name: scale}, codes.float() * wide

    return write


def fp8_scalar(name: str) -> Writer:
    """FP8 with one scale, a scalar, and one for activations."""

    def write(w: Tensor) -> Written:
        scale = w.abs().max() / FP8_MOST
        codes = (w / scale).to(torch.float8_e4m3fn)
        extra = {"activation_scale": torch.tensor(0.5)}
        return {"weight": codes, name: scale, **extra}, codes.float() * scale

    return write


def exponents(w: Tensor, rows: int, columns: int, most: float) -> Tensor:
    """Return the biased power of two for each block under which the largest number is at most `most`."""
    return (torch.log2(largest(w, rows, columns) / most).ceil() + 127).clamp(0, 254).to(torch.uint8)


def mxfp8(name: str, *, rows: int = 1, columns: int = 32, typed: bool = False) -> Writer:
    """FP8 under powers of two, which are bytes or `typed`."""

    def write(w: Tensor) -> Written:
        powers = exponents(w, rows, columns, FP8_MOST)
        wide = spread(torch.exp2(powers.float() - 127), rows, columns, w.shape)
        codes = (w / wide).to(torch.float8_e4m3fn)
        return {"weight": codes, name: powers.view(torch.float8_e8m0fnu) if typed else powers}, codes.float() * wide

    return write


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp4_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest 4-bit floats' codes, and their values."""
    nearest = (w.abs()[..., None] - E2M1).abs().argmin(-1)
    values = torch.where(w < 0, -E2M1[nearest], E2M1[nearest])
    return torch.where(w < 0, nearest + 8, nearest).to(torch.uint8), values


def in_pairs(codes: Tensor) -> Tensor:
    """Return codes of 4 bits two to a byte, the first in the low half."""
    return codes[..., 0::2] + 16 * codes[..., 1::2]


def mxfp4(codes_name: str, scale_name: str, *, signed: bool = False, typed: bool = False) -> Writer:
    """MXFP4, one matrix: codes are bytes, or `signed` ones; powers are bytes, or `typed`."""

    def write(w: Tensor) -> Written:
        powers = exponents(w, 1, 32, 6.0)
        wide = spread(torch.exp2(powers.float() - 127), 1, 32, w.shape)
        codes, values = fp4_codes(w / wide)
        pairs = in_pairs(codes)
        scale = powers.view(torch.float8_e8m0fnu) if typed else powers
        return {codes_name: pairs.view(torch.int8) if signed else pairs, scale_name: scale}, values * wide

    return write


def nvfp4(codes_name: str, factor_name: str, *, divides: bool = False) -> Writer:
    """NVFP4, one matrix; its factor multiplies or `divides`."""

    def write(w: Tensor) -> Written:
        factor = w.abs().max() / (6.0 * FP8_MOST)
        scale = (largest(w, 1, 16) / 6.0 / factor).to(torch.float8_e4m3fn)
        wide = spread(scale.float(), 1, 16, w.shape) * factor
        codes, values = fp4_codes(w / wide.clamp(min=1e-9))
        written = (1 / factor)[None] if divides else factor
        parts = {codes_name: in_pairs(codes), "weight_scale": scale, factor_name: written}
        return parts | {"input_scale": torch.tensor(0.25)}, values * wide

    return write


def words(codes: Tensor, bits: int) -> Tensor:
    """Return codes `[n, m]` in words of 32 bits along the last dimension, the first in the lowest bits."""
    each = 32 // bits
    padded = F.pad(codes.long(), (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    total = (padded << (torch.arange(each) * bits)).sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def smallest_and_largest(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the range of each row's groups, zero included."""
    parts = w.unflatten(1, (-1, group))
    return parts.amin(-1).clamp(max=0.0), parts.amax(-1).clamp(min=0.0)


def integers(bits: int, group: int, *, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Writer:
    """Integers of compressed-tensors; group 0 is a whole row."""

    def write(w: Tensor) -> Written:
        own, half = group or w.shape[1], 1 << (bits - 1)
        low, high = smallest_and_largest(w, own)
        if symmetric:
            scale = (torch.maximum(-low, high) / (half - 0.5)).to(dtype)
            zero = torch.full_like(low, half)
        else:
            scale = ((high - low) / (2 * half - 1)).to(dtype)
            zero = (-low / scale.float()).round().clamp(0, 2 * half - 1)
        wide, zeros = (spread(each.float(), 1, own, w.shape) for each in (scale, zero))
        codes = (w / wide + zeros).round().clamp(0, 2 * half - 1)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(w.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zero.t(), bits).t()
        return parts, (codes - zeros) * wide

    return write


def int8_rows(w: Tensor) -> Written:
    """Signed bytes with a scale a row: `int-quantized`."""
    scale = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def asymmetric(w: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, zeros and 16-bit scales of groups of columns, and the numbers they stand for."""
    low, high = smallest_and_largest(w, group)
    most = (1 << bits) - 1
    scale = ((high - low) / most).half()
    zero = (-low / scale.float()).round().clamp(1, most)
    wide, zeros = (spread(each.float(), 1, group, w.shape) for each in (scale, zero))
    codes = (w / wide + zeros).round().clamp(0, most)
    return codes, zero, scale, (codes - zeros) * wide


def gptq(bits: int, group: int, *, version: int = 1, symmetric: bool = False) -> Writer:
    """GPTQ, its columns in the order of their groups."""

    def write(w: Tensor) -> Written:
        codes, zero, scale, values = asymmetric(w, group, bits)
        if symmetric:
            scale = (w.abs().unflatten(1, (-1, group)).amax(-1) / ((1 << (bits - 1)) - 0.5)).half()
            zero = torch.full_like(zero, 1 << (bits - 1))
            wide = spread(scale.float(), 1, group, w.shape)
            codes = (w / wide + zero[0, 0]).round().clamp(0, (1 << bits) - 1)
            values = (codes - zero[0, 0]) * wide
        parts = {
            "qweight": words(codes, bits).t(),
            "qzeros": words((zero - int(version == 1)).t(), bits),
            "scales": scale.t(),
            "g_idx": (torch.arange(w.shape[1]) // group).int(),
        }
        return parts, values

    return write


def awq(group: int) -> Writer:
    """AWQ, of 4 bits in the layout gemm."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def write(w: Tensor) -> Written:
        codes, zero, scale, values = asymmetric(w, group, 4)
        mixed = [words(each.t().unflatten(1, (-1, 8))[..., order].flatten(1), 4) for each in (codes, zero)]
        return {"qweight": mixed[0], "qzeros": mixed[1], "scales": scale.t()}, values

    return write


NF4 = torch.distributions.Normal(0.0, 1.0).icdf(
    torch.cat([torch.linspace(0.9677083, 0.5, 9)[:-1].flip(0), 1 - torch.linspace(0.9677083, 0.5, 8)[:-1]])
)
NF4 = torch.cat([NF4, torch.zeros(1)]).sort().values
NF4 = NF4 / NF4.max()
"""QLoRA's quantiles: eight above zero and seven below, the outermost at 0.9677083."""


def nf4(*, nested: bool) -> Writer:
    """NF4 of bitsandbytes, its scales in floats or `nested`."""

    def write(w: Tensor) -> Written:
        blocks = w.reshape(-1, 64)
        scale = blocks.abs().amax(1)
        codes = (blocks / scale[:, None])[..., None].sub(NF4).abs().argmin(-1).flatten()
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(w.shape)}
        parts = {"weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": NF4}
        if nested:
            offset = float(scale.mean())
            grid = torch.linspace(-1.0, 1.0, 256)
            off = F.pad(scale - offset, (0, -len(scale) % 256)).view(-1, 256)
            outer = off.abs().amax(1)
            inner = (off / outer[:, None])[..., None].sub(grid).abs().argmin(-1)
            scale = (grid[inner] * outer[:, None]).flatten()[: len(scale)] + offset
            parts["weight.absmax"] = inner.flatten()[: len(scale)].to(torch.uint8)
            parts |= {"weight.nested_absmax": outer, "weight.nested_quant_map": grid}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            parts["weight.absmax"] = scale
        text = json.dumps(state).encode()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        return parts, (NF4[codes].view(-1, 64) * scale[:, None]).view_as(w)

    return write
