"""Where an expert's numbers lie, as our kernels read them: addresses, extents, strides, and what codes mean."""

import ctypes
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from fiddler.devices.gates import Gate
from fiddler.formats.packed import SCALES, Code, Matrix, Packed
from fiddler.types import ExpertWeights

_MATRIX = struct.Struct("=3Q14qdQq")
"""`matrix` of matrix.h."""
_GATE = struct.Struct("=3q3d")
"""`gate_formula` of gates.h."""
_KINDS = {code: 1 + at for at, code in enumerate(Code)}
"""Numbers of kinds in matrix.h; 0 is bfloat16."""
SWIGLU = Gate()


class Outline(NamedTuple):
    """An expert's matrices and formula, as `expert` of native.c. The caller keeps the weights alive."""

    address: int
    hidden: int
    inner: int
    memory: object
    """Holds what lies at the address."""

    @classmethod
    def of(cls, weights: ExpertWeights, gate: Gate = SWIGLU) -> "Outline":
        """Look at an expert. Raises `ValueError` for one that the kernels do not take."""
        hidden, inner = weights.down.shape
        ups, biases = weights.up, weights.up_bias or (None,) * len(weights.up)
        joined = gate.gated and len(ups) == 1
        shapes = [tuple(matrix.shape) for matrix in ups]
        if shapes != ([(2 * inner, hidden)] if joined else [(inner, hidden)] * (1 + gate.gated)):
            raise ValueError(f"up is {shapes} where down is {(hidden, inner)}")
        if gate.interleaved and not joined:
            raise ValueError("gate and up take turns, and are not one matrix")
        if kind(ups[0]) != kind(ups[-1]):
            raise ValueError("gate and up are not of one kind")
        starts = (0, (1 if gate.interleaved else inner) if joined else 0)
        step = 2 if gate.interleaved else 1
        parts = [
            _matrix(matrix, bias, inner, first, step)
            for matrix, bias, first in zip((ups[0], ups[-1]), (biases[0], biases[-1]), starts, strict=True)
        ]
        parts.append(_matrix(weights.down, weights.down_bias, hidden, 0, 1))
        limits = gate.limit, gate.slope, gate.shift
        parts.append(_GATE.pack(gate.activation, gate.gated, gate.limit_after, *limits))
        memory = ctypes.create_string_buffer(b"".join(parts))
        return cls(ctypes.addressof(memory), hidden, inner, memory)


def described(matrix: Packed, bias: Tensor | None = None) -> object:
    """Return memory that describes a whole matrix. Raises `ValueError` for one that the kernels do not take."""
    return ctypes.create_string_buffer(_matrix(matrix, bias, matrix.shape[0], 0, 1))


def kind(matrix: Matrix) -> object:
    """Return what two matrices have in common that are multiplied side by side."""
    return (matrix.code, matrix.block[1], matrix.zeros is None) if isinstance(matrix, Packed) else None


def fits(weight: Matrix) -> bool:
    """Whether the kernels take a matrix `[out, in]` as it lies in memory."""
    if isinstance(weight, Packed):
        return all(part.device.type == "cpu" for part in weight.parts)
    return (
        weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.stride(1) == 1
        and weight.shape[1] > 0
        and weight.device.type == "cpu"
    )


def _matrix(matrix: Matrix, bias: Tensor | None, rows: int, first: int, step: int) -> bytes:
    """Describe rows `first`, `first + step`, … of a matrix."""
    if not fits(matrix):
        raise ValueError("a matrix is neither packed nor bfloat16 with its columns side by side")
    columns, kept = matrix.shape[1], (0, 0)
    if bias is not None:
        if bias.dtype != torch.bfloat16 or bias.shape != (matrix.shape[0],) or bias.device.type != "cpu":
            raise ValueError(f"a bias is {bias.dtype} {list(bias.shape)} where bfloat16 {[matrix.shape[0]]} is due")
        kept = bias.data_ptr() + first * bias.stride(0) * bias.itemsize, step * bias.stride(0)
    if not isinstance(matrix, Packed):
        at = (matrix.data_ptr(), 0, 0), (_extent(matrix), 0, 0), (matrix.stride(0) * matrix.itemsize, 0, 0)
        return _MATRIX.pack(*at[0], *at[1], *at[2], first, step, rows, columns, 1, columns, 0, 0, 1.0, *kept)
    parts = matrix.codes, matrix.scales, matrix.zeros
    pointers = [0 if part is None else part.data_ptr() for part in parts]
    extents = [0 if part is None else _extent(part) for part in parts]
    strides = [0 if part is None else part.stride(0) * part.itemsize for part in parts]
    kinds = _KINDS[matrix.code], 0 if matrix.scales is None else SCALES.index(matrix.scales.dtype)
    return _MATRIX.pack(
        *pointers, *extents, *strides, first, step, rows, columns, *matrix.block, *kinds, matrix.factor, *kept
    )


def _extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first number to behind its last.

    Raises `ValueError` where its memory ends before.
    """
    extent = (
        sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    ) * tensor.itemsize
    if tensor.storage_offset() * tensor.itemsize + extent > tensor.untyped_storage().nbytes():
        raise ValueError("a matrix is longer than its memory")
    return extent
