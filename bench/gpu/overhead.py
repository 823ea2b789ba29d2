"""What a layer takes beside the GPU's own work, with graphs on and every expert in a slot.

Every expert is in a slot, so that neither the CPU nor the link has anything to do, and the host is asked for every
layer all the same, as where a model does not fit: what keeps whole steps in one piece is switched off. Then

    overhead = wall - pieces - experts, of a layer

`wall` is the time from one layer's decision to the next one's on the host's clock, the mean over a step's layers
and the median over steps of one row; `pieces` is what a recorded piece between two experts calls takes, and
`experts` what the layer's top-k experts take from slots, both run again behind other work, so that the GPU never
waits for the host: the seconds in which the GPU has work are theirs, all others are overhead. Rows on their way,
launches that nothing hides, the plan, and the hops between threads are in it; recording the trace is too.

`idle` is a part of it: the time that the main stream rests between a dense part's end and the experts behind it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import anyio
import torch

from bench.gpu import overlap
from bench.gpu.clock import busy, spread, took
from bench.gpu.context import Context
from bench.gpu.models import sizes_of, vocabulary
from bench.gpu.running import prompts, read
from bench.gpu.slots import BUSY, visits_of
from fiddler import Engine
from fiddler.devices.gpu import Gpu
from fiddler.engine.graphs import Recorded
from fiddler.engine.rig import Rig
from fiddler.lanes.gpu_jobs import GpuJobs
from fiddler.trace import Trace


def overhead(ctx: Context) -> dict[str, Any]:
    """Measure a model of a few layers. Raises `RuntimeError` where its steps are not recorded."""
    try:
        return anyio.run(_measured, ctx)
    finally:
        ctx.shelf.tidy()


async def _measured(ctx: Context) -> dict[str, Any]:
    spec = ctx.sizes.few
    config = ctx.engine(slots=sizes_of(spec).total_experts, trace=True, waves="one")
    async with Engine(ctx.shelf.loader(spec), config) as engine:
        assert engine._loop is not None
        rig: Rig = engine._loop._rig
        if rig.steps.graphs is not None:
            rig.steps.graphs.resident = _nobody
        trace = await _decoded(ctx, engine)
        # While the engine is open, for closing it frees the memory that its graphs work in; it has nothing to do.
        return _apart(ctx, rig, trace)


def _apart(ctx: Context, rig: Rig, trace: Trace) -> dict[str, Any]:
    """Take the layers of a recorded run apart."""
    recorded, walls, gaps = _recorded(rig), overlap.layers(trace.decisions), overlap.gaps(trace)
    if not walls:
        raise RuntimeError("no step has two layers")
    with _entered(ctx, _jobs(rig).gpu) as gpu, torch.inference_mode():
        filler = busy(gpu, min(BUSY, ctx.sizes.gemm))
        pieces_s = _pieces_s(ctx, gpu, recorded, filler)
        experts_s = _experts_s(ctx, gpu, rig, filler)
    return {
        "model": ctx.sizes.few,
        "n_steps": len(walls),
        "wall_s": spread(walls),
        "pieces_s": pieces_s,
        "experts_s": experts_s,
        "overhead_s": median(walls) - pieces_s - experts_s,
        "idle_s": spread(gaps) if gaps else None,
    }


async def _decoded(ctx: Context, engine: Engine) -> Trace:
    """Decode one sequence; returns its record, without a warm-up's."""
    spec = ctx.sizes.few
    ask = partial(prompts, 1, ctx.sizes.n_prompt, vocabulary(spec))
    await read(engine, ask(1), ctx.sizes.n_new, ctx.sizes.patience_s)
    n_before = len(engine.trace().decisions)
    await read(engine, ask(2), ctx.sizes.n_new, ctx.sizes.patience_s)
    return overlap.decoding(engine.trace(), n_before, sizes_of(spec).top_k)


def _jobs(rig: Rig) -> GpuJobs:
    assert isinstance(rig.side.work, GpuJobs)
    return rig.side.work


def _nobody() -> None:
    """In place of what runs layers without the host."""


def _recorded(rig: Rig) -> Recorded:
    graphs = rig.steps.graphs
    if graphs is None or graphs.why_not:
        raise RuntimeError(f"decoding runs without graphs: {'' if graphs is None else graphs.why_not}")
    for (wave, n_rows, _, _), recorded in graphs.kinds.items():
        if (wave, n_rows) == (0, 1) and recorded is not None and len(recorded.segments) > 2:
            return recorded
    raise RuntimeError("no step of one row was recorded")


@contextmanager
def _entered(ctx: Context, gpu: Gpu) -> Iterator[Gpu]:
    """Be in the streams of an engine that has nothing to do."""
    gpu.enter()
    try:
        yield gpu
    finally:
        ctx.gpu.enter()


def _pieces_s(ctx: Context, gpu: Gpu, recorded: Recorded, filler: Any) -> float:
    """Return the seconds of a piece between two experts calls: neither the first of a step nor the last."""
    middle = recorded.segments[1:-1]

    def replay() -> None:
        for segment in middle:
            segment.graph.replay()

    return _typical(ctx, gpu, replay, filler) / len(middle)


def _experts_s(ctx: Context, gpu: Gpu, rig: Rig, filler: Any) -> float:
    """Return the seconds of a layer's top-k experts of one row each."""
    jobs = _jobs(rig)
    shape = sizes_of(ctx.sizes.few)
    # Each run visits other slots: a layer's experts come from memory, not from a cache.
    step = max(1, rig.side.n_slots // shape.top_k)
    every = [
        visits_of([first + i * step for i in range(shape.top_k)], 1, gpu.device) for first in range(min(step, 16))
    ]
    turns = cycle(every)
    dtype = jobs.host.weights(0, 0).down.dtype
    hidden = torch.full((1, shape.hidden), 0.5, dtype=dtype, device=gpu.device)
    out = hidden.new_zeros(shape.top_k, shape.hidden)
    return _typical(ctx, gpu, lambda: jobs.experts.run(0, next(turns), hidden, out), filler)


def _typical(ctx: Context, gpu: Gpu, work: Any, filler: Any) -> float:
    took(gpu, gpu.main, work)
    return median(took(gpu, gpu.main, work, 4, before=filler) for _ in range(max(ctx.sizes.passes, 3)))
