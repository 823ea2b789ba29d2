"""A run as it happened: lanes side by side, predictions and what came of them, and when nobody worked."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from statistics import median, quantiles
from typing import Any

import anyio

from bench.gpu.clock import spread
from bench.gpu.context import Context, said
from bench.gpu.models import sizes_of, vocabulary
from bench.gpu.running import Reading, prompts, read
from fiddler import Engine
from fiddler.cli import timeline as drawing
from fiddler.cost.model import LANES
from fiddler.trace import Decision, Trace


def timeline(ctx: Context) -> dict[str, Any]:
    """Record a model that does not fit while it decodes, and draw it."""
    return {"run": _run(ctx)}


def _run(ctx: Context) -> dict[str, Any]:
    spec, budget = place(ctx)
    trace, reading, n_slots = anyio.run(_traced, ctx, spec, budget)
    walls, worked = layers(trace.decisions), lanes(trace)
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
        "lanes": worked,
        "prediction": prediction(trace.decisions),
        "layer_wall_s": spread(walls) if walls else None,
        "nobody_s_a_layer": worked["nobody_s"] / max(len(trace.decisions), 1),
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
        trace = decoding(engine.trace(), n_before, sizes_of(spec).top_k)
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


def since(trace: Trace, start_s: float) -> Trace:
    """Return what of a run began at `start_s` or later, in seconds from there."""
    spans = [replace(s, start_s=s.start_s - start_s, end_s=s.end_s - start_s) for s in trace.spans]
    decisions = [replace(d, at_s=d.at_s - start_s) for d in trace.decisions]
    later = [s for s in spans if s.start_s >= 0.0], [d for d in decisions if d.at_s >= 0.0]
    return Trace(spans=later[0], decisions=later[1])


def decoding(trace: Trace, n_before: int, top_k: int) -> Trace:
    """Return the decoding of one sequence, which comes after `n_before` decisions and the prompt's.

    Its layers have at most `top_k` visits. Raises `RuntimeError` where no layer was decided, as where every expert
    is in a slot and the host is not asked.
    """
    made = [d for d in trace.decisions[n_before:] if d.n_rows <= top_k]
    if not made:
        raise RuntimeError("no layer of a decoding step was decided")
    found = since(trace, made[0].at_s)
    return Trace(spans=found.spans, decisions=[d for d in found.decisions if d.n_rows <= top_k])


def lanes(trace: Trace) -> dict[str, Any]:
    """Return each lane's seconds of work, and those in which two, all or none worked at the same time."""
    changes = sorted((at, n, s.lane) for s in trace.spans for at, n in ((s.start_s, 1), (s.end_s, -1)))
    jobs: Counter[str] = Counter()
    seconds: defaultdict[frozenset[str], float] = defaultdict(float)
    for (at, n, lane), (until, *_) in pairwise((*changes, *changes[-1:])):
        jobs[lane] += n
        seconds[frozenset(lane for lane in LANES if jobs[lane])] += until - at

    def of(*wanted: str) -> float:
        return sum(taken for working, taken in seconds.items() if working.issuperset(wanted))

    return {
        "wall_s": of(),
        "busy_s": {lane: of(lane) for lane in LANES},
        "overlap_s": {**{f"{a} and {b}": of(a, b) for a, b in combinations(LANES, 2)}, "all": of(*LANES)},
        "nobody_s": seconds[frozenset()],
    }


def prediction(decisions: Sequence[Decision]) -> dict[str, Any]:
    """Return how far predicted makespans were off: `|predicted / measured - 1|`. Raises `ValueError` for none."""
    errors = sorted(abs(d.predicted_s / d.measured_s - 1.0) for d in decisions if d.measured_s > 0.0)
    if not errors:
        raise ValueError("no layer was decided")
    p90 = quantiles(errors, n=10, method="inclusive")[-1] if len(errors) > 1 else errors[0]
    return {"n_layers": len(errors), "median": median(errors), "p90": p90}


def layers(decisions: Sequence[Decision]) -> list[float]:
    """Return, by wave, the host's seconds from one layer's decision to the next one's, the mean over its layers."""
    by_wave: dict[int, list[float]] = {}
    for decision in decisions:
        by_wave.setdefault(decision.wave, []).append(decision.at_s)
    return [(max(own) - min(own)) / (len(own) - 1) for own in by_wave.values() if len(own) > 1]
