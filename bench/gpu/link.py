"""What the link carries: both ways, alone and beside the host's experts, from memory locked and not."""

from functools import partial
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bench.gpu.clock import spread, took, until
from bench.gpu.context import Context
from bench.gpu.host import HostExperts
from fiddler.devices.gpu import Gpu, Stream
from fiddler.devices.staging import StagingRing
from fiddler.store.pinned import on_pages

BESIDE_S = 1.0
"""Of copies beside experts, at least."""
_TOGETHER = 4
"""Copies that are queued at once, so that the link does not rest between them."""


def link(ctx: Context) -> dict[str, Any]:
    """Measure copies of `copy_bytes` from and to pinned memory; GB/s."""
    gpu, n, passes = ctx.gpu, ctx.sizes.copy_bytes, ctx.sizes.passes
    host, there = gpu.pinned(n, dtype=torch.uint8).fill_(1), torch.empty(n, dtype=torch.uint8, device=gpu.device)
    up = [_gbs(gpu, gpu.link, there, host) for _ in range(passes)]
    down = [_gbs(gpu, gpu.down, host, there) for _ in range(passes)]
    return {"copy_bytes": n, "to_gpu_gbs": spread(up), "to_host_gbs": spread(down)}


def _gbs(gpu: Gpu, stream: Stream, to: Tensor, source: Tensor) -> float:
    return to.nbytes / took(gpu, stream, lambda: to.copy_(source, non_blocking=True), _TOGETHER) / 1e9


def beside(ctx: Context) -> dict[str, Any]:
    """Copy while another thread runs experts as the CPU lane does; GB/s of both, alone and side by side.

    Of the copies and of the passes over the experts those count that ended while the other went on.
    """
    gpu, n = ctx.gpu, ctx.sizes.copy_bytes
    experts = HostExperts.of(next(iter(ctx.sizes.shapes.values())), ctx.sizes.read_bytes)
    host, there = gpu.pinned(n, dtype=torch.uint8).fill_(1), torch.empty(n, dtype=torch.uint8, device=gpu.device)
    alone = [experts.gbs() for _ in range(ctx.sizes.passes)]
    link_alone = [_gbs(gpu, gpu.link, there, host) for _ in range(ctx.sizes.passes)]
    passes, begun, stop = list[tuple[float, float]](), Event(), Event()  # (when it ended, GB/s)
    n_threads = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(n_threads)  # each thread has its own setting
        with torch.inference_mode():
            try:
                while not stop.is_set():
                    passes.append((perf_counter(), experts.gbs()))
                    begun.set()
            finally:
                begun.set()

    thread = Thread(target=work, name="bench-experts")
    thread.start()
    begun.wait()
    copied, began_s = list[float](), perf_counter()
    try:
        while perf_counter() - began_s < BESIDE_S or len(copied) < ctx.sizes.passes:
            copied.append(_gbs(gpu, gpu.link, there, host))
        ended_s = perf_counter()
    finally:
        stop.set()
        thread.join()
    within = [rate for at, rate in passes if began_s <= at <= ended_s] or [passes[-1][1]]
    return {
        "experts_gbs": spread(alone),
        "experts_beside_copies_gbs": spread(within),
        "copies_gbs": spread(link_alone),
        "copies_beside_experts_gbs": spread(copied),
    }


def pageable(ctx: Context) -> dict[str, Any]:
    """Copy memory that can be paged out: through the driver, and through `StagingRing` by the size of its pieces.

    GB/s of the wall's clock, from the call to when the last block has landed.
    """
    gpu, sizes = ctx.gpu, ctx.sizes
    memory = torch.ones(sizes.copy_bytes, dtype=torch.uint8)
    there = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=gpu.device)
    pairs = list(zip(memory.split(sizes.block_bytes), there.split(sizes.block_bytes), strict=True))

    def through(ring: StagingRing | None) -> float:
        began_s = perf_counter()
        for block, to in pairs:
            if ring is None:
                gpu.link.run(partial(to.copy_, block))
            else:
                ring.copy(block, to)
        until(gpu.link.mark())
        return memory.nbytes / (perf_counter() - began_s) / 1e9

    rings = {f"{piece >> 20} MiB": StagingRing(gpu, piece_bytes=piece) for piece in sizes.pieces}
    ways: dict[str, StagingRing | None] = {"driver": None, **rings}
    return {
        "block_bytes": sizes.block_bytes,
        "gbs": {name: spread(through(ring) for _ in range(sizes.passes)) for name, ring in ways.items()},
    }


def pinning(ctx: Context) -> dict[str, Any]:
    """Lock pieces of memory that is there already; GB/s, and how many pieces were refused."""
    rates, sizes = list[float](), ctx.sizes
    memory = [on_pages(1, sizes.pin_bytes)[0].fill_(1) for _ in range(sizes.pins)]
    locked: list[Tensor] = []
    try:
        for piece in memory:
            began_s = perf_counter()
            if ctx.gpu.pin(piece):
                rates.append(piece.nbytes / (perf_counter() - began_s) / 1e9)
                locked.append(piece)
    finally:
        for piece in locked:
            ctx.gpu.unpin(piece)
    return {
        "piece_bytes": sizes.pin_bytes,
        "n_refused": len(memory) - len(locked),
        "gbs": spread(rates) if rates else None,
    }
