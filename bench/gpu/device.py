"""The GPU by itself: what it reads and multiplies at most, and what launches take."""

from collections.abc import Callable
from importlib import import_module
from time import perf_counter
from typing import Any

import torch

from bench.gpu.clock import Work, spread, took, until
from bench.gpu.context import Context

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


def launches(ctx: Context) -> dict[str, Any]:
    """Measure launches in a row: what one keeps the host for, and how far apart the GPU gets to them.

    Of a kernel of Triton's, of one of torch's, and of a graph of `N_KERNELS` of torch's.
    """
    gpu, n = ctx.gpu, ctx.sizes.launches
    x = torch.zeros(1, device=gpu.device)
    ways: dict[str, Callable[[], Work]] = {
        "torch kernel": lambda: lambda: x.add_(1.0),
        "triton kernel": lambda: _triton(ctx, x),
        "graph": lambda: _graph(ctx, x),
    }
    found = dict[str, Any]()
    for name, make in ways.items():
        try:
            found[name] = _launched(ctx, make(), n)
        except Exception as error:  # each has its own: no Triton, no compiler, what cannot be recorded
            found[name] = {"unavailable": f"{type(error).__name__}: {error}"}
    return {"n_launches": n, "n_kernels_of_graph": N_KERNELS, **found}


def _launched(ctx: Context, work: Work, n: int) -> dict[str, float]:
    gpu = ctx.gpu
    gpu.launch(work)
    until(gpu.main.mark())
    began, began_s = gpu.main.mark(), perf_counter()
    for _ in range(n):
        gpu.launch(work)
    host_s = perf_counter() - began_s
    return {"host_s": host_s / n, "gpu_s": until(gpu.main.mark()).since(until(began)) / n}


def _triton(ctx: Context, x: torch.Tensor) -> Work:
    if ctx.gpu.device.type != "cuda":
        raise RuntimeError(f"Triton has no kernels for {ctx.gpu.device}")
    touch: Any = import_module("bench.gpu.empty_kernel").touch
    return lambda: touch[(1,)](x)


def _graph(ctx: Context, x: torch.Tensor) -> Work:
    def kernels() -> None:
        for _ in range(N_KERNELS):
            x.add_(1.0)

    ctx.gpu.launch(kernels)
    graph, _ = ctx.gpu.capture(ctx.gpu.pool(), kernels)
    return graph.replay
