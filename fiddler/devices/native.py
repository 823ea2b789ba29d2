"""Our own kernels in native.c and its headers: compiled once for this machine, and kept in the user's cache folder.

They need only gcc as `cc`, or the compiler that `$CC` names. Without it, torch's kernels do the work.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fiddler.config import cache_folder, most_threads
from fiddler.devices.library import VERSION_S, compiled, keep, kept, loaded, run
from fiddler.devices.outline import Outline, described
from fiddler.formats.packed import Matrix, Packed
from fiddler.scheduler.routing import Load

logger = logging.getLogger("fiddler")

SOURCE = Path(__file__).with_name("native.c")
HEADERS = tuple(sorted(SOURCE.parent.glob("*.h")))
"""What it includes."""
FLAGS = ("-O3", "-march=native", "-fira-region=all", "-fopenmp", "-shared", "-fPIC")
MOST_ROWS = 64
"""Beyond, a matmul is bound by operations, not by memory, and torch's blocked kernels are made for that."""
_SLACK, _ROOM_A_COLUMN = 256, 4 * (2 * 16 + 3 * 4 + 3)
"""Columns more than a thread's room is made for, and its bytes a column: as in desk.h."""
UNUSED = "cannot compile our own kernels, so experts run on torch's, which may be slower"
DEFAULT = "cc"
"""The compiler, where `$CC` names none."""


class Native:
    """The compiled kernels: activations are bfloat16, and weights bfloat16 or packed.

    `torch.get_num_threads()` threads work: torch's own team, for gcc's OpenMP runtime is the one that torch loads.
    `made` is the compiled library; raises `OSError` or `AttributeError` for another one.
    """

    def __init__(self, made: bytes, library: Path) -> None:
        self.library = library
        """File of the compiled kernels, if they are kept."""
        functions = loaded(made)
        pointer, integer, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._matmul = functions.fiddler_matmul
        self._matmul.argtypes = [pointer, integer, *[pointer] * 3, *[integer] * 3, threads]
        self._matmul.restype = None
        self._experts = functions.fiddler_experts
        self._experts.argtypes = [pointer, *[integer] * 3, pointer, integer, threads]
        self._experts.restype = integer
        self._product, self._decode = functions.fiddler_product, functions.fiddler_decode
        self._product.argtypes = [*[pointer] * 3, integer, pointer, integer, threads]
        self._decode.argtypes = [*[pointer] * 3, integer, threads]

    def matmul(self, x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
        """Return `x Wᵀ + b`, `[n, out]`, of `x` `[n, in]`; torch does what the kernels do not take.

        One long function, since it runs several times a layer and token; `fits` says what the kernels take.
        """
        if isinstance(weight, Packed):
            return self._packed(x, weight, bias)
        (out, columns), (stride, step), (n_rows, width) = weight.shape, weight.stride(), x.shape
        if (
            not (x.dtype == weight.dtype == torch.bfloat16)
            or step != 1
            or width != columns
            or not columns
            or not weight.is_cpu
            or not (bias is None or bias.dtype == torch.bfloat16)
            or (torch.is_grad_enabled() and learns(x, weight))
        ):
            return F.linear(x, weight, bias)
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        y = x.new_empty(n_rows, out)
        added = None if bias is None else bias.data_ptr()
        n_threads = min(torch.get_num_threads(), most_threads())
        self._matmul(weight.data_ptr(), stride, x.data_ptr(), added, y.data_ptr(), out, columns, n_rows, n_threads)
        return y

    def _packed(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        (n_rows, width), (out, columns) = x.shape, weight.shape
        if width != columns:
            raise ValueError(f"rows are {width} wide where the matrix is {out} x {columns}")
        if x.dtype != torch.bfloat16 or (torch.is_grad_enabled() and learns(x)):
            return F.linear(x, weight.dense(x.dtype), bias)
        if n_rows > MOST_ROWS:
            return F.linear(x, self.dense(weight), bias)
        x, y, matrix = x.contiguous(), x.new_empty(n_rows, out), described(weight, bias)
        n_threads = min(torch.get_num_threads(), most_threads())
        room = _room(x, n_threads, columns)
        done = self._product(matrix, x.data_ptr(), y.data_ptr(), n_rows, room.data_ptr(), room.numel(), n_threads)
        if done:
            raise ValueError("a packed matrix is not as it says it is")
        return y

    def dense(self, weight: Packed) -> Tensor:
        """Return `weight.dense(torch.bfloat16)`, with all threads.

        Raises `ValueError` for a matrix that the kernels do not take.
        """
        matrix, y = described(weight), torch.empty(weight.shape, dtype=torch.bfloat16)
        n_threads = min(torch.get_num_threads(), most_threads())
        room = _room(y, n_threads, weight.shape[1])
        if self._decode(matrix, y.data_ptr(), room.data_ptr(), room.numel(), n_threads):
            raise ValueError("a packed matrix is not as it says it is")
        return y

    def experts(self, loads: Sequence[Load], outlines: Sequence[Outline], rows: Tensor, out: Tensor) -> None:
        """Run whole experts, all at once; `rows` and `out` are `[n, H]`.

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
        table, n_rows = array("Q"), 0  # of `load` of native.c
        start, to, row_bytes = rows.data_ptr(), out.data_ptr(), hidden * rows.itemsize
        for load, outline in zip(loads, outlines, strict=True):
            if outline.hidden != hidden or outline.inner != inner:
                raise ValueError(
                    f"expert {load.expert} is {outline.hidden} x {outline.inner}, not {hidden} x {inner}"
                )
            shift = load.start * row_bytes
            table.extend((outline.address, start + shift, to + shift, load.n_rows))
            n_rows += load.n_rows
        n_threads = min(torch.get_num_threads(), most_threads())
        mine = (max(hidden, inner) // _SLACK + 2) * _SLACK * _ROOM_A_COLUMN
        room = rows.new_empty(n_threads * mine // 2 + 2 * n_rows * inner)
        done = self._experts(
            table.buffer_info()[0], len(loads), hidden, inner, room.data_ptr(), 2 * room.numel(), n_threads
        )
        if done != len(loads):
            raise ValueError(f"the kernels do not take load {done} of {len(loads)}")


def _room(beside: Tensor, n_threads: int, columns: int) -> Tensor:
    """Return memory in which so many threads multiply matrices of so many columns."""
    n_bytes = n_threads * (columns // _SLACK + 2) * _SLACK * _ROOM_A_COLUMN
    return beside.new_empty(n_bytes, dtype=torch.uint8)


def learns(*tensors: Tensor) -> bool:
    """Whether gradients are wanted; our kernels compute none."""
    return any(tensor.requires_grad for tensor in tensors)


def native() -> Native | None:
    """Return the kernels, compiled unless they were before; `None` where they cannot be had, and the log says why.

    They are had with gcc: another compiler's OpenMP runtime would come to stand beside torch's.
    """
    return _native(cache_folder(), os.environ.get("CC", "").strip() or DEFAULT)


@lru_cache
def _native(folder: Path, command: str) -> Native | None:
    try:
        compiler = shlex.split(command)
        version = run([*compiler, "--version"], VERSION_S)
        if b"Free Software Foundation" not in version:
            logger.info("CC=%s %s: it is not gcc", command, UNUSED)
            return None
        return _made(folder / f"native-{_make(version)}.so", compiler)
    except FileNotFoundError as error:
        level = (
            logging.INFO if command == DEFAULT else logging.WARNING
        )  # a machine without a compiler is no mistake
        logger.log(level, "CC=%s %s: %s", command, UNUSED, error)
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("CC=%s %s: %s", command, UNUSED, error)
    return None


def _made(library: Path, compiler: Sequence[str]) -> Native:
    """Return the kernels: the kept ones, or else compiled anew, and kept where only we can write."""
    with suppress(OSError):
        return Native(kept(library), library)
    made = compiled(compiler, SOURCE, FLAGS)
    try:
        keep(library, made)
    except OSError as error:
        logger.info("the compiled kernels are not kept, so each start compiles them: %s", error)
    return Native(made, library)


def _make(version: bytes) -> str:
    """Return all that the compiled file depends on: source, flags, compiler and the machine's instructions."""
    with suppress(OSError):
        version += b"".join(
            line
            for line in Path("/proc/cpuinfo").read_bytes().splitlines()
            if line.startswith((b"model name", b"flags"))
        )
    machine = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    sources = [file.read_bytes() for file in (SOURCE, *HEADERS)]
    make = b"\0".join([*sources, " ".join(FLAGS).encode(), version, machine.encode()])
    return hashlib.sha256(make).hexdigest()[:12]
