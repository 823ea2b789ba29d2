"""A run as it happened: lanes side by side, predictions and what came of them, and when nobody worked."""

from typing import Any

import anyio

from bench.gpu import overlap
from bench.gpu.clock import spread
from bench.gpu.context import Context, said
from bench.gpu.models import sizes_of, vocabulary
from bench.gpu.running import Reading, prompts, read
from fiddler import Engine
from fiddler.cli import timeline as drawing
from fiddler.trace import Trace


def timeline(ctx: Context) -> dict[str, Any]:
    """Record a model that does not fit while it decodes, and draw it."""
    return {"run": _run(ctx)}


def _run(ctx: Context) -> dict[str, Any]:
    spec, budget = place(ctx)
    trace, reading, n_slots = anyio.run(_traced, ctx, spec, budget)
    gaps, walls, lanes = overlap.gaps(trace), overlap.layers(trace.decisions), overlap.lanes(trace)
    about = {
        "title": "Decoding: CPU experts, copies and GPU side by side",
        "run": f"{spec} on {ctx.gpu.name}, {budget:g} GiB of it, {n_slots} slots; routing replayed",
        "speed": f"one sequence, {reading.tokens_per_s or 0.0:.3g} tokens/s while recorded",
    }
    return {
        "model": spec,
        "budget_gib": budget,
        "n_slots": n_slots,
        "tokens_per_s": reading.tokens_per_s,
        "hits": reading.hits,
        "lanes": lanes,
        "prediction": overlap.prediction(trace.decisions),
        "layer_wall_s": spread(walls) if walls else None,
        "idle_s": spread(gaps) if gaps else None,
        "nobody_s_a_layer": lanes["nobody_s"] / max(len(trace.decisions), 1),
        "files": _written(ctx, trace, about),
    }


def place(ctx: Context) -> tuple[str, float]:
    """Return the model that decoding leaves in memory, and the middle one of the budgets."""
    budgets = sorted(ctx.sizes.budgets_gib)
    return ctx.sizes.models[-1], budgets[len(budgets) // 2]


async def _traced(ctx: Context, spec: str, budget: float) -> tuple[Trace, Reading, int]:
    """Decode one sequence; returns the record of its decoding steps."""
    sizes = ctx.sizes
    async with Engine(ctx.shelf.loader(spec), ctx.engine(budget, trace=True)) as engine:
        await read(engine, prompts(1, sizes.n_prompt, vocabulary(spec), 1), sizes.n_warm, sizes.patience_s)
        n_before = len(engine.trace().decisions)
        asked = prompts(1, sizes.n_prompt, vocabulary(spec), 2)
        reading = await read(engine, asked, sizes.n_new, sizes.patience_s)
        trace = overlap.decoding(engine.trace(), n_before, sizes_of(spec).top_k)
        return trace, reading, engine.statistics().n_slots


def _written(ctx: Context, trace: Trace, about: dict[str, str]) -> dict[str, str]:
    """Write the Chrome trace and the picture beside the results; returns their names, or why there is none."""
    found = {}
    for kind in ("json", "png"):
        file = ctx.beside / f"timeline-{ctx.label}.{kind}"
        try:
            drawing.check(file)
            drawing.write(trace, file, about, from_s=0.0, length_s=None)
            found[kind] = f"{ctx.beside.name}/{file.name}"
        except Exception as error:  # no matplotlib, no disk: the numbers count without a picture
            found[kind] = said(error)
    return found
