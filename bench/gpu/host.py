"""The host's experts and memory: what the CPU lane reads, by rows, and what there is to read at most."""

from typing import Any

import torch

from bench import kernels
from bench.gpu.clock import spread
from bench.gpu.context import Context
from bench.report import Spread
from fiddler.config import EngineConfig
from fiddler.devices.calibrate import calibrated_kernels

MOST_ROWS = 16
TINY = (64, 32)
"""(hidden, intermediate) of experts whose weights take no time to read."""


def host(ctx: Context) -> dict[str, Any]:
    """Measure what the host reads and multiplies at most: the best pass of several ways, in a thread of its own."""
    found = kernels.ceilings_aside(ctx.sizes.read_bytes)
    return {
        "read_gbs": found.gbs,
        "ways_to_read": {way: spread([one.low, one.median, one.high]) for way, one in found.ways_to_read.items()},
        "flop_per_s": found.flop_per_s,
        "threads": torch.get_num_threads(),
    }


def experts(ctx: Context) -> list[dict[str, Any]]:
    """Measure whole experts by shape and rows; GB/s of their weights. As `bench.kernels` does."""
    sizes, found = ctx.sizes, list[dict[str, Any]]()
    for name, shape in sizes.shapes.items():
        for n_rows in [n for n in sizes.rows if n <= MOST_ROWS]:
            gbs = _rate(shape, n_rows, sizes.read_bytes, sizes.passes)
            found.append({"shape": name, "n_rows": n_rows, "gbs": spread([gbs.low, gbs.median, gbs.high])})
    return found


def dispatch(ctx: Context) -> dict[str, Any]:
    """Measure an expert whose weights take no time: what is left is the host's own."""
    gbs = _rate(TINY, 1, 1, max(ctx.sizes.passes * 20, 20))
    return {"expert_s": kernels.expert(*TINY).nbytes / gbs.median / 1e9}


def _rate(shape: tuple[int, int], n_rows: int, nbytes: int, passes: int) -> Spread:
    sample = kernels.expert(*shape)
    picked = calibrated_kernels([*sample.up, sample.down], EngineConfig())
    return kernels.expert_rate(*shape, n_rows, picked, nbytes, passes).gbs
