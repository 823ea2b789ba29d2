"""Finds the fastest matmul kernel per weight shape and row count, measured once and stored; sets torch's threads.

Weights of a decoding step come from memory, not from a cache, so measurements walk over copies of the matrix that
together exceed the caches. A packed weight may be decoded in registers for every few rows, or whole before torch
multiplies: that is measured too, for each kind. Results are stored per instruction set, thread count, torch version
and version of our own kernels: the choice is then a pure function of the stored file, and stays the same from run
to run.

torch keeps a number of threads for each thread, and a common one for threads without a number of their own.
`torch.set_num_threads` sets both. `set_own_threads` puts the common number back, by a short-lived thread.

`choose_kernels`, `choose_threads` and `compute_lane` prepare a loaded model for its engine.
"""

import json
import os
import platform
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread
from time import perf_counter
from typing import Any, TypeVar

import torch

from fiddler.config import EngineConfig, cache_folder, most_threads
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.kernels import BUCKETS, KernelName, Kernels, ShapeKey, shape_key
from fiddler.devices.native import MOST_ROWS, Native, native
from fiddler.errors import ConfigError
from fiddler.formats.packed import Matrix, Packed
from fiddler.given import read_json, shown
from fiddler.lanes.experts import ComputeLane
from fiddler.models import dense
from fiddler.models.loaded import LoadedModel

T = TypeVar("T")

_one = Lock()
"""A lock: two threads that put the common number back at once could each restore the other's."""


def set_own_threads(n: int) -> None:
    """Set torch's number of threads for the calling thread to `n`, and for no other."""
    if torch.get_num_threads() == n:  # having asked, the thread takes no common number later on
        return
    with _one:
        others = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(n)
        _in_new_thread(lambda: torch.set_num_threads(others))


def _in_new_thread(ask: Callable[[], T]) -> T:
    """Return the result of `ask` in a new thread, which has no number of its own."""
    said: list[T] = []
    thread = Thread(target=lambda: said.append(ask()), name="fiddler-threads", daemon=True)
    thread.start()
    thread.join()
    return said[0]


MIN_BYTES = 1 << 20
"""Matrices below this stay in a cache, and are measured there. Dispatch then decides, and of torch's kernels
`linear` has the least."""
SET_BYTES = 768 << 20
"""Copies of a larger matrix together hold at least this much: more than the 300 MB caches of large servers."""
REPEATS = 7
BUDGET_S = 0.3
"""Time for one shape and row count; large matrices are repeated less, at least twice."""
_TORCH = "torch."
"""The beginning of the kinds that are not packed."""
MARGIN = 0.97
"""A kernel must take less than this share of `linear`'s time to be chosen: a tie is no reason to switch."""


def calibrated_kernels(matrices: Iterable[Matrix], config: EngineConfig) -> Kernels:
    """Return the kernel choice for weights shaped like `matrices` `[out, in]`; missing ones are measured."""
    if config.kernels == "linear":
        return Kernels()
    ours = native()
    file = calibration_file(config)
    stored = _read(file, ours)
    samples = {shape_key(m): m for m in matrices if _worth(m, ours)}
    missing = [key for key in sorted(samples, key=str) if any((key, rows) not in stored for rows in BUCKETS)]
    for key in missing:
        times = measure(samples[key], ours)
        stored.update({(key, rows): fastest(times[rows]) for rows in BUCKETS})
    if missing:
        _write(file, stored)
    return Kernels(stored, ours)


def _ours(config: EngineConfig) -> Native | None:
    return None if config.kernels == "linear" else native()


def _worth(matrix: Matrix, ours: Native | None) -> bool:
    """Whether there is a choice between kernels."""
    if isinstance(matrix, Packed):
        return ours is not None
    if matrix.dtype != torch.bfloat16:
        return False
    return matrix.nbytes >= MIN_BYTES or ours is not None


def amx() -> bool:
    """Whether bf16 AMX tiles are there; without them `rows_last` loses by up to five times and is not tried."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def calibration_file(config: EngineConfig) -> Path:
    """Return the file of this machine's calibration; its name holds the version of our own kernels."""
    folder, ours = config.calibration_dir or cache_folder(), _ours(config)
    isa = "amx" if amx() else torch.backends.cpu.get_cpu_capability().lower()
    version = torch.__version__.partition("+")[0]
    made = f"torch{version}" if ours is None else f"torch{version}-{ours.library.stem}"
    return folder / f"kernels-{platform.machine()}-{isa}-{torch.get_num_threads()}threads-{made}.json"


def fastest(times: dict[KernelName, float]) -> KernelName:
    """Return the kernel to take, given each one's seconds."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < MARGIN * times["linear"] else "linear"


def candidates(key: ShapeKey, n_rows: int, ours: Native | None) -> tuple[KernelName, ...]:
    """Return the kernels worth measuring for a matrix and a row count, on this machine.

    Raises `AttributeError` for a dtype that torch does not have.
    """
    out, columns, kind, _ = key
    names: list[KernelName] = ["linear"]
    large = kind.startswith(_TORCH) and out * columns * _dtype(kind).itemsize >= MIN_BYTES
    if amx() and large:
        names.append("rows_last")
    if n_rows == 1 and large:
        names.append("vector")
    if ours is not None and n_rows <= MOST_ROWS:
        names.append("native")
    return tuple(names)


def _dtype(kind: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, kind.removeprefix(_TORCH))
    return found


def measure(matrix: Matrix, ours: Native | None) -> dict[int, dict[KernelName, float]]:
    """Return the least seconds of each kernel by row count, for matrices like one, bfloat16 or packed.

    Kernels take turns, so that drift hits all alike. The least counts, since noise only adds.
    """
    n_copies = 2 if matrix.nbytes < MIN_BYTES else max(2, SET_BYTES // matrix.nbytes + 1)
    side_by_side = isinstance(matrix, Packed) or matrix.stride(1) == 1
    with torch.inference_mode():
        copies = _copies(matrix, n_copies)
        return {rows: _measure_rows(copies, rows, ours if side_by_side else None) for rows in BUCKETS}


def _copies(matrix: Matrix, n: int) -> list[Matrix]:
    """Return matrices like one, each part of them all in one piece: freed, it goes back to the system."""
    if isinstance(matrix, Packed):
        parts = [part.expand(n, *part.shape).contiguous() for part in matrix.parts]
        return [matrix.with_parts(own) for own in zip(*parts, strict=True)]
    (out, columns), side_by_side = matrix.shape, matrix.stride(1) == 1
    made = torch.full((n, out, columns) if side_by_side else (n, columns, out), 0.01, dtype=matrix.dtype)
    return list(made if side_by_side else made.mT)


def _measure_rows(copies: list[Matrix], n_rows: int, ours: Native | None) -> dict[KernelName, float]:
    kernels, first = Kernels(native=ours), copies[0]
    names = candidates(shape_key(first), n_rows, ours)
    if len(names) == 1:
        return {"linear": 0.0}
    x = torch.full((n_rows, first.shape[1]), 0.5, dtype=torch.bfloat16)
    matmuls = {name: kernels.kernel(name, packed=isinstance(first, Packed)) for name in names}
    times: dict[KernelName, list[float]] = {name: [] for name in names}
    began = perf_counter()
    for repeat in range(REPEATS + 1):
        for name in names:
            started = perf_counter()
            matmuls[name](x, copies[0], None)
            times[name].append(perf_counter() - started)
            copies.append(copies.pop(0))
        if repeat >= 2 and perf_counter() - began > BUDGET_S:
            break
    return {name: min(values[1:]) for name, values in times.items()}  # the first one warms up


def _read(file: Path, ours: Native | None) -> dict[tuple[ShapeKey, int], KernelName]:
    """Return the stored choices that this version would measure too; `vector` is wrong for other row counts."""
    try:
        entries: list[dict[str, Any]] = read_json(file)["kernels"]
        found = {((e["out"], e["in"], e["kind"], e["side_by_side"]), e["rows"]): e["kernel"] for e in entries}
        return {of: kernel for of, kernel in found.items() if kernel in candidates(*of, ours)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # absent or of another make: measured anew


def _write(file: Path, choice: dict[tuple[ShapeKey, int], KernelName]) -> None:
    entries = [
        {
            "out": out,
            "in": columns,
            "kind": kind,
            "side_by_side": side_by_side,
            "rows": rows,
            "kernel": kernel,
        }
        for ((out, columns, kind, side_by_side), rows), kernel in choice.items()
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"kernels": entries}, indent=1))
        partial.replace(file)
    except OSError:
        return  # a read-only home costs a measurement at each start


def checked(config: object) -> EngineConfig:
    """Return the options a caller gave, or the defaults for `None`. Raises `ConfigError` for anything else."""
    if config is None:
        return EngineConfig()
    if isinstance(config, EngineConfig):
        return config
    instead = "EngineConfig(...)"
    if isinstance(config, str):
        instead = f"EngineConfig(device={shown(config)})"
    elif isinstance(config, Mapping):
        instead = "EngineConfig.from_mapping(...)"
    raise ConfigError(f"config must be an EngineConfig, not {shown(config)}; write {instead}")


def choose_kernels(loaded: LoadedModel, config: EngineConfig, *, with_dense: bool = True) -> Kernels:
    """Return the CPU's kernels for a model's experts and its dense part, calibrated as `config` says."""
    experts = expert_matrices(loaded)
    matrices = [*experts, *dense.matrices(loaded.model)] if with_dense else experts
    return calibrated_kernels(matrices, config)


def expert_matrices(loaded: LoadedModel) -> list[Matrix]:
    """Return matrices like all those of a model's experts among which kernels may have to be chosen."""
    samples = [loaded.weights(layer, 0) for layer in range(len(loaded.n_experts))]
    narrow = loaded.dtype == torch.bfloat16  # torch decodes packed weights for all other rows
    return [m for sample in samples for m in sample.matrices if narrow or not isinstance(m, Packed)]


def choose_threads(loaded: LoadedModel, config: EngineConfig, default: int) -> None:
    """Set this thread's torch threads as `config` says, or to one for a model of tiny experts, or to `default`.

    Waking a second thread costs more than a small matmul, and where another program has that thread's core, every
    one of them waits for it.
    """
    sample = loaded.weights(0, 0)
    tiny = all(matrix.nbytes < MIN_BYTES for matrix in sample.matrices)
    set_own_threads(config.threads or (1 if tiny else min(default, most_threads())))


def compute_lane(loaded: LoadedModel, kernels: Kernels) -> ComputeLane:
    """Return the lane that runs a model's experts for a forward without a driver."""
    return ComputeLane(CpuDevice(loaded.weights, loaded.formulas, kernels), loaded.n_experts)


@contextmanager
def torch_worker(n_threads: int) -> Generator[None]:
    """Be a lane's worker, with modes and a thread count of its own."""
    set_own_threads(n_threads)
    with torch.inference_mode():
        yield
