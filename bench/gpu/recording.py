"""An engine's decoding steps recorded as graphs, and what its calibration finds of host and dense part."""

from typing import Any

import anyio

from bench.gpu.context import Context
from bench.gpu.models import sizes_of, vocabulary
from bench.gpu.running import prompts, read
from fiddler import Engine

N_NEW = 12
"""Tokens: the first step of a kind runs as the model's code does, the second is recorded, others replay it."""


def recording(ctx: Context) -> dict[str, Any]:
    """Open a model of a few layers, decode, and say what was recorded and what was calibrated."""
    found = anyio.run(_decode, ctx)
    ctx.shelf.tidy()
    return {"model": ctx.sizes.few, "records": bool(found["n_pieces"]) and not found["why_not"], **found}


async def _decode(ctx: Context) -> dict[str, Any]:
    spec = ctx.sizes.few
    # Half of the experts in slots: a step is a piece for every layer, as where a model does not fit.
    n_slots = max(1, sizes_of(spec).total_experts // 2)
    async with Engine(ctx.shelf.loader(spec), ctx.engine(slots=n_slots)) as engine:
        for n in (1, 4):
            await read(engine, prompts(n, ctx.sizes.n_prompt, vocabulary(spec), n), N_NEW, ctx.sizes.patience_s)
        assert engine._loop is not None
        side: Any = engine._loop._rig.side
        costs = side.costs
        return {
            "n_pieces": [] if side.graphs is None else [len(r.segments) for r in side.graphs.kinds.values() if r],
            "why_not": "nothing is recorded for this model" if side.graphs is None else side.graphs.why_not,
            "n_slots": n_slots,
            "cpu_slowdown_beside_link": costs.contention.cpu,
            "link_slowdown_beside_cpu": costs.contention.link,
            "host_layer_s": costs.host_s,
            "move_fixed_s": costs.moves.fixed_s,
            "move_row_s": costs.moves.row_s,
            "dense_layer_s": costs.dense.rows(1),
            "head_s": costs.dense.head(1),
            "copy_s": costs.experts[0].copy_s,
            "expert_bytes": costs.experts[0].nbytes,
        }
