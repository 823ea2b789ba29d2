"""How fast this machine reads memory, and how near to that each matmul and a whole expert come.

    python -m bench.kernels [--shape qwen3-30b-a3b] [--shape 4096x14336] [--rows 1,2,4,8,16] [--json FILE]

Decoding reads every activated expert's weights once per step, so its limit is the machine's read bandwidth. A
figure in GB/s counts the weights only, once. Each measurement walks over copies that together are several times
larger than any cache, as the experts of a model are.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import machine
from bench.report import Spread, command, finish, listing, result
from fiddler.calibration.kernels import calibrated_kernels
from fiddler.config import EngineConfig
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.devices.formula import ExpertFormula
from fiddler.devices.kernels import Kernels, linear, rows_last
from fiddler.devices.native import MOST_ROWS, native
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

SHAPES = {"qwen3-30b-a3b": (2048, 768), "mixtral-8x7b": (4096, 14336)}
"""(hidden, intermediate) of an expert, by model."""
SET_BYTES = 1 << 30
"""A set of copies holds this much: three times the largest cache found on servers today."""
GEMM_SIZE = 4096
"""Rows and columns of the largest matmul; half as many are as fast."""
PASSES = 7
AT_ONCE = 8
"""Experts to a layer."""
SWIGLU = ExpertFormula(gated=True, activation=F.silu)

Call = Callable[[], object]


def rate(calls: Sequence[Call], n_bytes: int, passes: int) -> Spread:
    """Return the GB/s of passes over `calls`, which together read `n_bytes`; a first pass warms up.

    Of operations, where `n_bytes` counts those.
    """
    values = []
    with torch.inference_mode():
        for _ in range(passes + 1):
            started = perf_counter()
            for call in calls:
                call()
            values.append(n_bytes / (perf_counter() - started) / 1e9)
    return Spread.of(values[1:])


def read_ceiling(n_bytes: int = SET_BYTES, passes: int = PASSES) -> dict[str, Spread]:
    """Return the GB/s of several ways to read memory once with all threads; the best of all is the ceiling.

    A core asks for more at a time when it follows several streams, so ways with one, two and many are tried.
    """
    n = n_bytes // 8
    flat = torch.full((2 * n,), 0.01)  # [2n] float32
    halves, rows = flat.view(2, n), flat.view(-1, min(4096, n))  # [2, n], [r, c]
    narrow = rows.view(torch.bfloat16)  # [r, 2c]
    x, x_narrow = torch.full((rows.shape[1],), 0.01), torch.full((narrow.shape[1], 2), 0.01).bfloat16()
    ways: dict[str, Call] = {
        "sum, one stream a thread": flat.sum,
        "dot, two streams a thread": lambda: torch.dot(halves[0], halves[1]),
        "mv float32, a stream a row": lambda: torch.mv(rows, x),
        "mm bfloat16, a stream a row": lambda: torch.mm(narrow, x_narrow),
    }
    if (ours := native()) is not None:
        one = x_narrow.t()[:1].contiguous()
        ways["ours bfloat16, four streams a thread"] = lambda: ours.matmul(one, narrow, None)
    return {way: rate([call], flat.nbytes, passes) for way, call in ways.items()}


def ceiling(ways: Mapping[str, Spread]) -> float:
    """Return the machine's read ceiling in GB/s: the best pass of the best way."""
    return max(spread.high for spread in ways.values())


def gemm_flop_per_s(set_bytes: int = SET_BYTES, passes: int = PASSES) -> Spread:
    """Return the operations per second of a large square bf16 matmul; its best pass is this machine's limit.

    A multiplication and an addition are two operations. The three matrices together hold at most `set_bytes`.
    """
    n = min(GEMM_SIZE, isqrt(set_bytes // 6))
    x, weight = (torch.full((n, n), value, dtype=torch.bfloat16) for value in (0.5, 0.01))
    return rate([lambda: linear(x, weight, None)], 2 * n**3, passes).scaled(1e9)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of each limit the best pass counts."""

    gemm: Spread
    """Operations per second of a large bf16 matmul."""
    ways_to_read: dict[str, Spread]
    """GB/s by way."""

    @property
    def flop_per_s(self) -> float:
        """The most operations per second."""
        return self.gemm.high

    @property
    def gbs(self) -> float:
        """The most GB/s."""
        return ceiling(self.ways_to_read)

    def also(self, ways: dict[str, Spread]) -> "Ceilings":
        """Return the same with further ways to read."""
        return Ceilings(self.gemm, self.ways_to_read | ways)

    def or_better(self, other: "Ceilings") -> "Ceilings":
        """Return the better of two measurements of each."""
        ways = {way: _better(spread, other.ways_to_read[way]) for way, spread in self.ways_to_read.items()}
        return Ceilings(_better(self.gemm, other.gemm), ways)


def ceilings(set_bytes: int, passes: int = PASSES) -> Ceilings:
    """Measure with all of this thread's torch threads, on matrices and memory of `set_bytes`."""
    return Ceilings(gemm_flop_per_s(set_bytes, passes), read_ceiling(set_bytes, passes))


def ceilings_aside(set_bytes: int) -> Ceilings:
    """Measure in a thread that ends: OpenMP workers that stay behind keep an engine's from waiting actively."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ceilings, set_bytes).result()


def _better(one: Spread, other: Spread) -> Spread:
    return max(one, other, key=lambda spread: spread.high)


def copies(out: int, columns: int, set_bytes: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Return equal matrices `[out, columns]` that together hold at least `set_bytes`."""
    n = -(-set_bytes // (dtype.itemsize * out * columns))
    return [torch.full((out, columns), 0.01, dtype=dtype) for _ in range(n)]


def kernel_rates(
    shape: tuple[int, int], n_rows: int, set_bytes: int, passes: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Spread]:
    """Measure the GB/s of every kernel that can multiply `n_rows` rows by a matrix of `shape` `[out, in]`."""
    out, columns = shape
    weights = copies(out, columns, set_bytes, dtype)
    x = torch.full((n_rows, columns), 0.5, dtype=dtype)
    padded = x.expand(2, -1) if n_rows == 1 else x
    kernels: dict[str, Callable[[Tensor], Call]] = {
        "linear": lambda w: lambda: linear(x, w, None),
        "rows_last": lambda w: lambda: rows_last(padded, w, None),
    }
    if dtype == torch.bfloat16 and n_rows <= MOST_ROWS and (ours := native()) is not None:
        kernels["native"] = lambda w: lambda: ours.matmul(x, w, None)
    if n_rows == 1:
        kernels["mv"] = lambda w: lambda: torch.mv(w, x[0])
    n_bytes = sum(w.nbytes for w in weights)
    return {name: rate([bind(w) for w in weights], n_bytes, passes) for name, bind in kernels.items()}


def expert_rate(
    hidden: int, intermediate: int, n_rows: int, kernels: Kernels, set_bytes: int, passes: int
) -> Spread:
    """Measure whole SwiGLU experts as the engine runs them, `AT_ONCE` to a layer, `n_rows` rows each; GB/s."""
    n_bytes = 6 * hidden * intermediate
    n_layers = -(-set_bytes // n_bytes // AT_ONCE)
    experts = [expert(hidden, intermediate) for _ in range(n_layers * AT_ONCE)]
    device = CpuDevice(lambda _, expert: experts[expert], (SWIGLU,), kernels)
    loads = [Load(i, i * n_rows, (i + 1) * n_rows) for i in range(AT_ONCE)]
    rows = torch.full((AT_ONCE * n_rows, hidden), 0.5, dtype=torch.bfloat16)
    out = empty_results(rows)
    layers = [experts[start : start + AT_ONCE] for start in range(0, len(experts), AT_ONCE)]
    calls = [partial(device.run, 0, loads, layer, rows, out) for layer in layers]
    return rate(calls, n_bytes * len(experts), passes)


def expert(hidden: int, intermediate: int) -> ExpertWeights:
    """Return a gated expert in bfloat16, gate and up as one matrix."""
    up = torch.full((2 * intermediate, hidden), 0.01, dtype=torch.bfloat16)
    return ExpertWeights((up,), torch.full((hidden, intermediate), 0.01, dtype=torch.bfloat16))


def attainable_gbs(
    shapes: Sequence[tuple[int, int]], n_rows: int, set_bytes: int, passes: int, dtype: torch.dtype
) -> float:
    """Return the GB/s of reading matrices of `shapes` one after the other, each at its best kernel's rate.

    The limit for whoever has these matrices to multiply: nothing between the kernels takes any time.
    """
    best = {
        shape: max(gbs.median for gbs in kernel_rates(shape, n_rows, set_bytes, passes, dtype).values())
        for shape in sorted(set(shapes))
    }
    sizes = [out * columns for out, columns in shapes]
    return sum(sizes) / sum(size / best[shape] for size, shape in zip(sizes, shapes, strict=True))


def measure(
    shapes: Mapping[str, tuple[int, int]], rows: Sequence[int], set_bytes: int, passes: int, config: EngineConfig
) -> dict[str, Any]:
    """Measure everything and return the report."""
    ways = read_ceiling(set_bytes, passes)
    limit = ceiling(ways)
    rates: list[dict[str, Any]] = []
    experts: list[dict[str, Any]] = []
    for hidden, inner in shapes.values():
        sample = expert(hidden, inner)
        kernels = calibrated_kernels([*sample.up, sample.down], config)
        for n_rows in rows:
            for out, columns in ((2 * inner, hidden), (hidden, inner)):
                for name, gbs in kernel_rates((out, columns), n_rows, set_bytes, passes).items():
                    about = {"kernel": name, "out": out, "columns": columns, "n_rows": n_rows}
                    rates.append({**about, "gbs": gbs, "of_ceiling": gbs.median / limit})
            gbs = expert_rate(hidden, inner, n_rows, kernels, set_bytes, passes)
            about = {"hidden": hidden, "intermediate": inner, "n_rows": n_rows}
            experts.append({**about, "gbs": gbs, "of_ceiling": gbs.median / limit})
    return result(
        "kernels",
        machine.describe(),
        virtual=False,
        settings={"set_bytes": set_bytes, "passes": passes, "shapes": shapes, "rows": list(rows)},
        read_ceiling_gbs=limit,
        ways_to_read=ways,
        gemm_flop_per_s=gemm_flop_per_s(set_bytes, passes),
        kernels=rates,
        experts=experts,
    )


def _shape(text: str) -> tuple[str, tuple[int, int]]:
    if text in SHAPES:
        return text, SHAPES[text]
    hidden, _, inner = text.partition("x")
    try:
        return text, (int(hidden), int(inner))
    except ValueError as error:
        known = ", ".join(SHAPES)
        raise argparse.ArgumentTypeError(f"{text!r} is neither HIDDENxINTERMEDIATE nor one of {known}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("kernels", __doc__)
    parser.add_argument("--shape", type=_shape, action="append", help="a model's name or HIDDENxINTERMEDIATE")
    parser.add_argument("--rows", default="1,2,4,8,16", help="row counts (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--set-mib", type=int, default=SET_BYTES >> 20, help="weights per measurement, in MiB")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--calibration-dir", type=Path, help="default: where the engine keeps it")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = dict(options.shape) if options.shape else SHAPES
    rows = [int(n) for n in options.rows.split(",")]
    config = EngineConfig(calibration_dir=options.calibration_dir)
    report = measure(shapes, rows, options.set_mib << 20, options.passes, config)
    ways = [{"way": way, "gbs": gbs} for way, gbs in report["ways_to_read"].items()]
    gemm = f"\nLarge bf16 matmul: {report['gemm_flop_per_s'].scaled(1e-12):.2f} TFLOP/s"
    tables = [listing("Reading memory; the ceiling is the best pass", ways), gemm]
    tables += [listing("One matmul", report["kernels"]), listing("A whole SwiGLU expert", report["experts"])]
    finish(options, report, *tables)


if __name__ == "__main__":
    main()
