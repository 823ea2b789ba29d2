"""The kernels in native.c: compiled once for this machine with its C compiler, kept in the user's cache folder.

They need nothing but gcc as `cc` (or what `$CC` names). Where there is none, torch's kernels do the work.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

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

    `torch.get_num_threads()` threads work: torch's own team, for gcc's OpenMP runtime is the one that torch loads.
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
        """Return `x Wᵀ + b`, `[n, out]`, of `x` `[n, in]`; what does not fit is left to torch."""
        out, columns = weight.shape
        alike = x.dtype == weight.dtype and x.shape[1] == columns and (bias is None or bias.dtype == weight.dtype)
        if not fits(weight) or not alike or _learns(x, weight):
            return F.linear(x, weight, bias)
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        y = x.new_empty(x.shape[0], out)
        self._matmul(
            weight.data_ptr(),
            weight.stride(0),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            out,
            columns,
            x.shape[0],
            torch.get_num_threads(),
        )
        return y

    def experts(self, loads: Sequence[Load], outlines: Sequence["Outline"], rows: Tensor, out: Tensor) -> None:
        """Run whole SiLU-gated experts without biases, all at once; `rows` and `out` are `[n, H]`.

        Each load's rows of `rows` go through its expert into the same rows of `out`, which has no gaps. The caller
        keeps the weights alive that the outlines are of. Raises `ValueError` where rows or an expert are not what
        the first expert's shape says, or rows not bfloat16.
        """
        rows = rows.contiguous()
        hidden, inner = outlines[0].hidden, outlines[0].inner
        for tensor in (rows, out):
            if tensor.dtype != torch.bfloat16 or tensor.shape[1] != hidden:
                raise ValueError(
                    f"rows are {tensor.dtype}, {tensor.shape[1]} wide, and not bfloat16, {hidden} wide"
                )
        table = np.empty(len(loads), _EXPERT)
        start, to, row_bytes = rows.data_ptr(), out.data_ptr(), hidden * rows.itemsize
        for i, (load, outline) in enumerate(zip(loads, outlines, strict=True)):
            if (outline.hidden, outline.inner) != (hidden, inner):
                raise ValueError(
                    f"expert {load.expert} is {outline.hidden} x {outline.inner}, not {hidden} x {inner}"
                )
            shift = load.start * row_bytes
            table[i] = (*outline.pointers, start + shift, to + shift, *outline.strides, load.n_rows)
        middle = rows.new_empty(sum(load.n_rows for load in loads), inner)
        threads = torch.get_num_threads()
        self._experts(table.ctypes.data, len(table), hidden, inner, middle.data_ptr(), threads)


class Outline(NamedTuple):
    """Where an expert's matrices lie and how large they are."""

    pointers: tuple[int, int, int]
    """Of gate, up and down."""
    strides: tuple[int, int, int]
    hidden: int
    inner: int

    @classmethod
    def of(cls, weights: ExpertWeights) -> "Outline":
        """Look at an expert. Raises `ValueError` for one that the kernels do not take."""
        gate, up, down = weights.up[0], weights.up[-1], weights.down
        hidden, inner = down.shape
        joined = len(weights.up) == 1
        shapes = [tuple(matrix.shape) for matrix in weights.up]
        if shapes != ([(2 * inner, hidden)] if joined else [(inner, hidden)] * 2):
            raise ValueError(f"up is {shapes} where down is {(hidden, inner)}")
        if not all(map(fits, weights.parts)):
            raise ValueError("a matrix is not bfloat16 with its columns side by side")
        halfway = inner * gate.stride(0) * gate.itemsize if joined else 0
        pointers = gate.data_ptr(), up.data_ptr() + halfway, down.data_ptr()
        return cls(pointers, (gate.stride(0), up.stride(0), down.stride(0)), hidden, inner)


def _learns(*tensors: Tensor) -> bool:
    """Whether somebody wants gradients, of which the kernels know nothing."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def takes(rows: Tensor, weights: Sequence[ExpertWeights]) -> bool:
    """Whether the kernels may run these rows: nobody wants gradients of them."""
    return not torch.is_grad_enabled() or not _learns(rows, *(own.down for own in weights))


def fits(weight: Tensor) -> bool:
    """Whether the kernels take a matrix `[out, in]` as it lies in memory."""
    return (
        weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.stride(1) == 1
        and weight.shape[1] > 0
        and weight.device.type == "cpu"
    )


def native() -> Native | None:
    """Return the kernels, compiled unless they were before; `None` where they cannot be had.

    They are had with gcc: another compiler's OpenMP runtime would come to stand beside torch's.
    """
    return _native(cache_folder(), os.environ.get("CC") or "cc")


@lru_cache
def _native(folder: Path, command: str) -> Native | None:
    compiler = shlex.split(command)
    try:
        version = _run([*compiler, "--version"])
        if b"Free Software Foundation" not in version:
            return None
        name = f"native-{_make(version)}.so"
        with suppress(OSError):  # absent, damaged, or not ours
            return Native(_trusted(folder / name))
        try:
            return Native(compiled(compiler, folder / name))
        except OSError:  # nothing can be written there
            with TemporaryDirectory(prefix="fiddler-") as room:  # what is loaded stays when its file goes
                return Native(compiled(compiler, Path(room) / name))
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None


def _make(version: bytes) -> str:
    """Return what the compiled file depends on: source, flags, compiler and the machine's instructions."""
    with suppress(OSError):
        version += b"".join(
            line
            for line in Path("/proc/cpuinfo").read_bytes().splitlines()
            if line.startswith((b"model name", b"flags"))
        )
    machine = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    make = b"\0".join([SOURCE.read_bytes(), " ".join(FLAGS).encode(), version, machine.encode()])
    return hashlib.sha256(make).hexdigest()[:12]


def _trusted(library: Path) -> Path:
    """Return a file that nobody else could have written. Raises `OSError` for any other."""
    for path in (library, library.parent):
        found = path.stat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
            raise PermissionError(f"others may write {path}")
    return library


def compiled(compiler: Sequence[str], library: Path, *options: str) -> Path:
    """Compile into place, whole or not at all: another process may be doing the same.

    Raises `OSError` where nothing can be written there and `subprocess.SubprocessError` where the compiler fails.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=library.parent, prefix="native-") as room:
        made = Path(room) / library.name
        _run([*compiler, *FLAGS, *options, str(SOURCE), "-o", str(made), "-lm"])
        made.chmod(0o755)
        made.replace(library)
    return library


def _run(command: Sequence[str]) -> bytes:
    """Return what a compiler prints, in English."""
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_S, env=environment).stdout
