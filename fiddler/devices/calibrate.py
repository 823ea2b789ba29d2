"""Which kernel is fastest on this machine, measured once per weight shape and row count, and stored.

Weights of a decoding step come from memory, not from a cache, so each measurement walks over copies of the matrix
that together exceed the caches. Results are stored per instruction set, thread count and torch version: the choice
is then a pure function of what is stored, and stays the same from run to run.
"""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fiddler.config import EngineConfig
from fiddler.devices.kernels import (
    BUCKETS,
    KERNELS,
    KernelName,
    Kernels,
    ShapeKey,
    linear,
    rows_last,
    shape_key,
)

MIN_BYTES = 1 << 20
"""Matrices below this are not measured: dispatch decides there, and `linear` has the least."""
CACHE_BYTES = 256 << 20
"""Copies of a matrix together hold at least this much, so that none is found in a cache."""
MAX_COPIES_BYTES = 1 << 30
REPEATS = 7
MARGIN = 0.97
"""`rows_last` must take less than this share of `linear`'s time to be chosen: a tie is no reason to switch."""


def calibrated_kernels(matrices: Iterable[Tensor], config: EngineConfig) -> Kernels:
    """Return the kernel choice for weights shaped like `matrices` `[out, in]`, measuring what is not stored yet."""
    if config.kernels == "linear" or not amx():
        return Kernels()
    file = calibration_file(config)
    choice = _read(file)
    shapes = {shape_key(m) for m in matrices if m.nbytes >= MIN_BYTES and m.dtype == torch.bfloat16}
    missing = [key for key in sorted(shapes, key=str) if (key, 1) not in choice]
    for key in missing:
        choice.update({(key, rows): best(key, rows) for rows in BUCKETS})
    if missing:
        _write(file, choice)
    return Kernels(choice)


def amx() -> bool:
    """Whether bf16 AMX tiles are there; without them `rows_last` loses by up to five times and is not tried."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def calibration_file(config: EngineConfig) -> Path:
    """Return where this machine's calibration is stored."""
    folder = config.calibration_dir
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fiddler"
    version = torch.__version__.partition("+")[0]
    return folder / f"kernels-{platform.machine()}-amx-{torch.get_num_threads()}threads-torch{version}.json"


def best(key: ShapeKey, n_rows: int) -> KernelName:
    """Measure the kernels on one shape and row count; returns the fastest."""
    times = measure(key, n_rows)
    return "rows_last" if times["rows_last"] < MARGIN * times["linear"] else "linear"


def measure(key: ShapeKey, n_rows: int) -> dict[KernelName, float]:
    """Return the median seconds of each kernel, interleaved so that drift hits all alike."""
    out, columns, dtype = key
    n_copies = max(2, min(CACHE_BYTES, MAX_COPIES_BYTES) // (out * columns * dtype.itemsize) + 1)
    copies = [torch.full((out, columns), 0.01, dtype=dtype) for _ in range(n_copies)]
    x = torch.full((n_rows, columns), 0.5, dtype=dtype)
    times: dict[KernelName, list[float]] = {name: [] for name in KERNELS}
    with torch.inference_mode():
        for repeat in range(REPEATS + 1):
            for name in KERNELS:
                seconds = _time(name, x, copies[repeat % n_copies])
                if repeat:
                    times[name].append(seconds)
                copies.append(copies.pop(0))
    return {name: median(values) for name, values in times.items()}


def _time(name: KernelName, x: Tensor, weight: Tensor) -> float:
    kernel = rows_last if name == "rows_last" else linear
    rows = x.expand(2, -1) if name == "rows_last" and x.shape[0] == 1 else x
    started = perf_counter()
    kernel(rows, weight, None)
    return perf_counter() - started


def _read(file: Path) -> dict[tuple[ShapeKey, int], KernelName]:
    try:
        entries: list[dict[str, Any]] = json.loads(file.read_text())["kernels"]
        return {
            ((e["out"], e["in"], getattr(torch, e["dtype"])), e["rows"]): e["kernel"]
            for e in entries
            if e["kernel"] in KERNELS
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # absent or of another make: measured anew


def _write(file: Path, choice: dict[tuple[ShapeKey, int], KernelName]) -> None:
    entries = [
        {
            "out": out,
            "in": columns,
            "dtype": str(dtype).removeprefix("torch."),
            "rows": rows,
            "kernel": kernel,
        }
        for ((out, columns, dtype), rows), kernel in choice.items()
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"kernels": entries}, indent=1))
        partial.replace(file)
    except OSError:
        return  # a read-only home costs a measurement at each start, nothing else
