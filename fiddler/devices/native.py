"""The kernels in native.c: compiled once for this machine with its C compiler, kept in the user's cache folder.

They need nothing but `cc` (or what `$CC` names). Where there is none, or no OpenMP, torch's kernels do the work.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.config import cache_folder
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
MOST_ROWS = 64
"""Beyond, a matmul is bound by operations, not by memory, and torch's blocked kernels are made for that."""
COMPILE_S = 60
"""A compiler that takes longer is given up."""

_POINTERS = ("gate", "up", "down", "x", "y")
_COUNTS = ("gate_stride", "up_stride", "down_stride", "n_rows")
_EXPERT = np.dtype([*((name, np.uintp) for name in _POINTERS), *((name, np.int64) for name in _COUNTS)])
"""`expert` of native.c."""


class Native:
    """The compiled kernels; bfloat16 only.

    `torch.get_num_threads()` threads work: torch's own team, as both use the OpenMP runtime that torch has loaded.
    """

    def __init__(self, library: Path) -> None:
        self.library = library
        loaded = ctypes.CDLL(str(library))
        pointer, integer, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._matmul = loaded.fiddler_matmul
        self._matmul.argtypes = [pointer, integer, *[pointer] * 3, *[integer] * 3, threads]
        self._experts = loaded.fiddler_experts
        self._experts.argtypes = [pointer, *[integer] * 3, pointer, threads]
        self._matmul.restype = self._experts.restype = None

    def matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x Wᵀ + b`, `[n, out]`, of `x` `[n, in]`; a matrix that does not fit is left to torch."""
        out, columns = weight.shape
        if not fits(weight) or x.dtype != weight.dtype:
            return F.linear(x, weight, bias)
        x = x.contiguous()
        y = x.new_empty(x.shape[0], out)
        self._matmul(
            weight.data_ptr(),
            weight.stride(0),
            x.data_ptr(),
            None if bias is None else bias.contiguous().data_ptr(),
            y.data_ptr(),
            out,
            columns,
            x.shape[0],
            torch.get_num_threads(),
        )
        return y

    def experts(self, loads: Sequence[Load], weights: Sequence[ExpertWeights], rows: Tensor, out: Tensor) -> None:
        """Run whole SiLU-gated experts without biases, all at once; `rows` and `out` are `[n, H]`.

        Each load's rows of `rows` go through its weights into the same rows of `out`, which has no gaps. Raises
        `TypeError` for other rows than bfloat16, whose weights are `fits`.
        """
        if rows.dtype != torch.bfloat16 or out.dtype != torch.bfloat16:
            raise TypeError(f"rows are {rows.dtype} and not bfloat16")
        rows = rows.contiguous()
        hidden, inner = weights[0].down.shape
        table = np.empty(len(loads), _EXPERT)
        row_bytes = hidden * rows.itemsize
        for i, (load, own) in enumerate(zip(loads, weights, strict=True)):
            gate, up = own.up[0], own.up[-1]
            halfway = 0 if len(own.up) == 2 else inner * gate.stride(0) * gate.itemsize
            table[i] = (
                gate.data_ptr(),
                up.data_ptr() + halfway,
                own.down.data_ptr(),
                rows.data_ptr() + load.start * row_bytes,
                out.data_ptr() + load.start * row_bytes,
                gate.stride(0),
                up.stride(0),
                own.down.stride(0),
                load.n_rows,
            )
        middle = rows.new_empty(sum(load.n_rows for load in loads), inner)
        threads = torch.get_num_threads()
        self._experts(table.ctypes.data, len(table), hidden, inner, middle.data_ptr(), threads)


def fits(weight: Tensor) -> bool:
    """Whether the kernels take a matrix `[out, in]` as it lies in memory."""
    return weight.dtype == torch.bfloat16 and weight.stride(1) == 1


def native() -> Native | None:
    """Return the kernels, compiled unless they were before; `None` where they cannot be had."""
    return _native(cache_folder())


@lru_cache
def _native(folder: Path) -> Native | None:
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    try:
        library = folder / f"native-{_make(compiler)}.so"
        return Native(library if library.exists() else compiled(compiler, library))
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None


def _make(compiler: str) -> str:
    """Return what the compiled file depends on: source, flags, compiler and the machine's instructions."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_S).stdout
    machine = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    make = b"\0".join([SOURCE.read_bytes(), " ".join(FLAGS).encode(), version, machine.encode()])
    return hashlib.sha256(make).hexdigest()[:12]


def compiled(compiler: str, library: Path, *options: str) -> Path:
    """Compile into place, whole or not at all: another process may be doing the same.

    Raises `OSError` where nothing can be written there and `subprocess.SubprocessError` where the compiler fails.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=library.parent, prefix="native-") as room:
        made = Path(room) / library.name
        command = [compiler, *FLAGS, *options, str(SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_S)
        made.replace(library)
    return library
