"""Host and GPU by themselves: what each reads and multiplies at most, what the link carries, what launches take."""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bench import kernels, packed
from bench.gpu.clock import Work, spread, took, until
from bench.gpu.context import Context
from bench.report import Spread
from fiddler.calibration.kernels import calibrated_kernels
from fiddler.config import EngineConfig
from fiddler.devices.native import native
from fiddler.gpu.device import Gpu, Stream

MOST_ROWS = 16
TINY = (64, 32)
"""(hidden, intermediate) of experts whose weights take no time to read."""
TOGETHER = 4
"""Copies that are queued at once, so that the link does not rest between them."""
PACKED = "int4 g32"
"""The format of the packed experts, of `bench.packed`."""
N_KERNELS = 40
"""Of a graph: about as many as a layer's dense part has."""


def reading(ctx: Context) -> dict[str, Any]:
    """Measure ways to read the GPU's memory once; GB/s, and the ceiling is the best pass."""
    gpu, n = ctx.gpu, ctx.sizes.gpu_read_bytes
    wide = torch.full((n // 4,), 0.01, device=gpu.device)
    narrow = wide.view(torch.bfloat16).view(-1, min(4096, n // 2))
    x = torch.full((narrow.shape[1], 1), 0.01, dtype=torch.bfloat16, device=gpu.device)
    ways: dict[str, Work] = {
        "sum float32": wide.sum,
        "largest of float32": wide.amax,
        "mv bfloat16": lambda: torch.mv(narrow, x[:, 0]),
        "mm bfloat16": lambda: torch.mm(narrow, x),
    }
    found = {name: spread(_rates(ctx, work, n)) for name, work in ways.items()}
    return {"ways_to_read": found, "read_gbs": max(way["high"] for way in found.values())}


def _rates(ctx: Context, work: Work, nbytes: int) -> list[float]:
    took(ctx.gpu, ctx.gpu.main, work)
    return [nbytes / took(ctx.gpu, ctx.gpu.main, work, 4) / 1e9 for _ in range(ctx.sizes.passes)]


def multiplying(ctx: Context) -> dict[str, Any]:
    """Measure a large product of bfloat16 matrices; operations a second, the best pass."""
    gpu, n = ctx.gpu, ctx.sizes.gemm
    x, y = (torch.full((n, n), 0.01, dtype=torch.bfloat16, device=gpu.device) for _ in range(2))

    def work() -> object:
        return torch.mm(x, y)

    took(gpu, gpu.main, work)
    taken = [took(gpu, gpu.main, work, 4) for _ in range(ctx.sizes.passes)]
    return {"size": n, "flop_per_s": max(2.0 * n**3 / seconds for seconds in taken)}


def link(ctx: Context) -> dict[str, Any]:
    """Measure copies of `copy_bytes` from and to pinned memory; GB/s."""
    gpu, n, passes = ctx.gpu, ctx.sizes.copy_bytes, ctx.sizes.passes
    host, there = gpu.pinned(n, dtype=torch.uint8).fill_(1), torch.empty(n, dtype=torch.uint8, device=gpu.device)
    up = [_gbs(gpu, gpu.link, there, host) for _ in range(passes)]
    down = [_gbs(gpu, gpu.down, host, there) for _ in range(passes)]
    return {"copy_bytes": n, "to_gpu_gbs": spread(up), "to_host_gbs": spread(down)}


def _gbs(gpu: Gpu, stream: Stream, to: Tensor, source: Tensor) -> float:
    return to.nbytes / took(gpu, stream, lambda: to.copy_(source, non_blocking=True), TOGETHER) / 1e9


def launches(ctx: Context) -> dict[str, Any]:
    """Measure replays of a graph of `N_KERNELS` in a row: what one keeps the host for, and the GPU."""
    graph = _launched(ctx, _graph(ctx, torch.zeros(1, device=ctx.gpu.device)), ctx.sizes.launches)
    return {"n_launches": ctx.sizes.launches, "n_kernels_of_graph": N_KERNELS, "graph": graph}


def _launched(ctx: Context, work: Work, n: int) -> dict[str, float]:
    gpu = ctx.gpu
    gpu.launch(work)
    until(gpu.main.mark())
    began, began_s = gpu.main.mark(), perf_counter()
    for _ in range(n):
        gpu.launch(work)
    host_s = perf_counter() - began_s
    return {"host_s": host_s / n, "gpu_s": until(gpu.main.mark()).since(until(began)) / n}


def _graph(ctx: Context, x: torch.Tensor) -> Work:
    def kernels() -> None:
        for _ in range(N_KERNELS):
            x.add_(1.0)

    ctx.gpu.launch(kernels)
    graph, _ = ctx.gpu.capture(ctx.gpu.pool(), kernels)
    return graph.replay


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


def decoding(ctx: Context) -> dict[str, Any]:
    """Measure a packed expert of one row on the host. Raises `RuntimeError` without our kernels."""
    ours = native()
    if ours is None:
        raise RuntimeError("the kernels need gcc")
    hidden, inner = next(iter(ctx.sizes.shapes.values()))
    gbs, n_bytes = packed.expert_rate(ours, PACKED, (hidden, inner, kernels.AT_ONCE), 1, ctx.sizes.read_bytes)
    return {"expert_s": n_bytes / gbs.median / 1e9, "nbytes": n_bytes, "n_weights": 3 * hidden * inner}


def _rate(shape: tuple[int, int], n_rows: int, nbytes: int, passes: int) -> Spread:
    sample = kernels.expert(*shape)
    picked = calibrated_kernels([*sample.up, sample.down], EngineConfig())
    return kernels.expert_rate(*shape, n_rows, picked, nbytes, passes)
