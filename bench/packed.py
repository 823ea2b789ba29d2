"""Whole packed experts in our kernels, by format and rows, beside the same experts in bfloat16.

    python -m bench.packed [--shape qwen3-30b-a3b] [--rows 1,4,16] [--format mxfp4] [--json FILE]

A figure in GB/s counts codes, scales and zeros once; `of bf16` is the time as a share of the bfloat16 experts' own.
Every measurement walks over experts that together are larger than any cache.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench import machine
from bench.kernels import PASSES, ceiling, rate, read_ceiling
from bench.report import Spread, command, finish, listing, result
from fiddler.devices.native import Native, native
from fiddler.devices.outline import Outline
from fiddler.formats.packed import Code, Matrix, Packed
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

SHAPES = {"qwen3-30b-a3b": (2048, 768, 8), "gpt-oss-20b": (2880, 2880, 4)}
"""(hidden, intermediate, experts to a layer) by model."""
SET_BYTES = 1 << 29
WHOLE = 1 << 20
Described = tuple[Code, torch.dtype, tuple[int, int], bool]
FORMATS: dict[str, Described | Code | None] = {
    "bf16": None,
    "mxfp4": (Code.FP4, torch.float8_e8m0fnu, (1, 32), False),
    "nvfp4": (Code.FP4, torch.float8_e4m3fn, (1, 16), False),
    "int4 g32": (Code.INT4, torch.bfloat16, (1, 32), False),
    "int4 g128 zeros": (Code.INT4, torch.float16, (1, 128), True),
    "nf4 g64": (Code.NF4, torch.float32, (1, 64), False),
    "fp8 128x128": (Code.FP8, torch.bfloat16, (128, 128), False),
    "fp8 channel": (Code.FP8, torch.bfloat16, (1, WHOLE), False),
    "mxfp8": (Code.FP8, torch.float8_e8m0fnu, (1, 32), False),
    "int8 channel": (Code.INT8, torch.bfloat16, (1, WHOLE), False),
    "gguf q4_0": Code.Q4_0,
    "gguf q8_0": Code.Q8_0,
    "gguf mxfp4": Code.MXFP4,
    "gguf q4_k": Code.Q4_K,
    "gguf q5_k": Code.Q5_K,
    "gguf q6_k": Code.Q6_K,
}
"""Code, scales, their block, and whether there are zeros; or a code of blocks with scales of their own."""


def matrix(name: str, out: int, columns: int) -> Matrix:
    """Return a matrix of a format; its numbers are small, and otherwise of no matter."""
    described = FORMATS[name]
    if described is None:
        return torch.full((out, columns), 0.01, dtype=torch.bfloat16)
    if isinstance(described, Code):
        rows = torch.full((out, described.width(columns)), 0x11, dtype=torch.uint8)
        return Packed(described, rows, None, (out, columns), (1, described.run.group))
    code, scale, block, zeros = described
    grid = -(-out // block[0]), -(-columns // block[1])
    codes = torch.randint(0, 112, (out, columns * code.bits // 8), dtype=torch.uint8)
    kept = torch.full(grid, 8, dtype=torch.uint8) if zeros else None
    return Packed(code, codes, torch.full(grid, 2.0**-6).to(scale), (out, columns), block, kept)


def fills(name: str, shape: tuple[int, int, int]) -> bool:
    """Whether a format's blocks fill the rows of a shape."""
    described = FORMATS[name]
    return not isinstance(described, Code) or not any(size % described.run.columns for size in shape[:2])


def expert_rate(
    ours: Native, name: str, shape: tuple[int, int, int], n_rows: int, set_bytes: int
) -> tuple[Spread, int]:
    """Measure layers of experts with `n_rows` rows each; returns GB/s, and the bytes of an expert."""
    hidden, inner, at_once = shape
    n_bytes = sum(m.nbytes for m in (matrix(name, 2 * inner, hidden), matrix(name, hidden, inner)))
    n_layers = max(2, -(-set_bytes // n_bytes // at_once))
    experts = [
        ExpertWeights((matrix(name, 2 * inner, hidden),), matrix(name, hidden, inner))
        for _ in range(n_layers * at_once)
    ]
    outlines = [Outline.of(own) for own in experts]
    rows = torch.full((at_once * n_rows, hidden), 0.5, dtype=torch.bfloat16)
    loads, out = [Load(i, i * n_rows, (i + 1) * n_rows) for i in range(at_once)], torch.empty_like(rows)
    layers = [outlines[start : start + at_once] for start in range(0, len(outlines), at_once)]
    calls = [partial(ours.experts, loads, layer, rows, out) for layer in layers]
    return rate(calls, n_bytes * len(experts), PASSES), n_bytes


def measure(
    shapes: dict[str, tuple[int, int, int]], names: Sequence[str], rows: Sequence[int], set_bytes: int
) -> Any:
    """Measure everything and return the report."""
    ours = native()
    if ours is None:
        raise SystemExit("the kernels need gcc")
    limit, cells = ceiling(read_ceiling(set_bytes)), list[dict[str, Any]]()
    for model, shape in shapes.items():
        for n_rows in rows:
            plain_us = 0.0
            for name in ("bf16", *(each for each in names if each != "bf16" and fills(each, shape))):
                gbs, n_bytes = expert_rate(ours, name, shape, n_rows, set_bytes)
                us = n_bytes / gbs.high / 1e3
                plain_us = plain_us or us
                about = {"model": model, "format": name, "n_rows": n_rows, "us": round(us, 1)}
                cells.append({**about, "gbs": gbs, "of_ceiling": 0.0, "of_bf16": us / plain_us})
        limit = max(limit, ceiling(read_ceiling(set_bytes)))  # a shared machine is faster in some minutes
    for cell in cells:
        cell["of_ceiling"] = cell["gbs"].high / limit
    settings = {"set_bytes": set_bytes, "passes": PASSES, "shapes": shapes, "rows": list(rows)}
    return result(
        "packed", machine.describe(), virtual=False, settings=settings, read_ceiling_gbs=limit, experts=cells
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("packed", __doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="a model (default: all)")
    parser.add_argument("--format", choices=FORMATS, action="append", help="a format (default: all)")
    parser.add_argument("--rows", default="1,2,4,8,16,32", help="row counts (default: %(default)s)")
    parser.add_argument("--set-mib", type=int, default=SET_BYTES >> 20, help="weights per measurement, in MiB")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = {name: SHAPES[name] for name in options.shape or SHAPES}
    rows = [int(n) for n in options.rows.split(",")]
    report = measure(shapes, options.format or list(FORMATS), rows, options.set_mib << 20)
    ceiling_line = f"Read ceiling: {report['read_ceiling_gbs']:.1f} GB/s"
    finish(options, report, ceiling_line, listing("Whole SwiGLU experts", report["experts"]))


if __name__ == "__main__":
    main()
