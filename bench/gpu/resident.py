"""A model that fits the GPU entirely: Fiddler with every expert in a slot beside transformers on the same GPU.

The same weights, and the routers' own choice on both sides. transformers runs in the leanest loop there is (a
forward and an argmax over a `DynamicCache`, as `bench.peers.forwards`), is fed the tokens that Fiddler made and is
read back every token, as whoever shows tokens would; by each of its experts' implementations. All take turns;
within a turn Fiddler is first, for it makes the tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import anyio
import torch
from transformers import DynamicCache

from bench.gpu.clock import spread
from bench.gpu.context import Context, said
from bench.gpu.models import as_transformers, sizes_of, vocabulary
from bench.gpu.running import prompts, read
from bench.peers.peer import Picks, timed
from fiddler import Engine

PEERS = ("eager", "grouped_mm")
OURS = "fiddler"
TURNS = 4
"""The first, in which kernels are compiled and graphs recorded, does not count."""


Speeds = dict[str, list[float]]
"""Decoded tokens a second, by system and turn."""
Failed = dict[str, str]
"""Why a system did not run."""


def resident(ctx: Context) -> dict[str, Any]:
    """Measure both side by side, for each number of sequences."""
    return anyio.run(_resident, ctx)


async def _resident(ctx: Context) -> dict[str, Any]:
    spec, rows = ctx.sizes.few, list[dict[str, Any]]()
    total = sizes_of(spec).total_experts
    async with Engine(ctx.shelf.loader(spec, replayed=False), ctx.engine(slots=total)) as engine:
        n_slots = engine.statistics().n_slots
        theirs = as_transformers(ctx.shelf.loaded(), spec, ctx.gpu.device)
        for n in ctx.sizes.n_sequences:
            speeds, failed = Speeds(), Failed()
            for turn in range(TURNS):
                await _turn(ctx, engine, theirs, n, turn, speeds, failed)
            rows.append(_row(n, speeds, failed))
            ctx.keep("resident", model=spec, n_slots=n_slots, n_experts=total, rows=rows)
    return {"model": spec, "n_slots": n_slots, "n_experts": total, "rows": rows}


async def _turn(
    ctx: Context, engine: Engine, theirs: Any, n: int, turn: int, speeds: Speeds, failed: Failed
) -> None:
    asked = prompts(n, ctx.sizes.n_prompt, vocabulary(ctx.sizes.few), turn)
    ours = await read(engine, asked, ctx.sizes.n_new, inf)
    if turn and ours.tokens_per_s is not None:
        speeds.setdefault(OURS, []).append(ours.tokens_per_s)
    for name in PEERS[turn % len(PEERS) :] + PEERS[: turn % len(PEERS)]:
        if name in failed:
            continue
        try:
            theirs.set_experts_implementation(name)
            with _their_attention():
                rate = _theirs(theirs, asked, ours.tokens, ctx.sizes.patience_s)
        except Exception as error:  # an implementation that this torch or GPU does not have
            failed[name] = said(error)
        else:
            if turn:
                speeds.setdefault(name, []).append(rate)


@contextmanager
def _their_attention() -> Iterator[None]:
    """Give torch back its own choice of attention kernels: an engine on a GPU takes cuDNN's away, process-wide."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@torch.inference_mode()
def _theirs(model: Any, asked: Sequence[list[int]], made: Sequence[list[int]], patience_s: float) -> float:
    """Return the tokens a second that transformers decodes when it is fed the same."""
    cache, device = DynamicCache(config=model.config), model.device
    first, rest = torch.tensor(asked, device=device), torch.tensor(made, device=device)

    def forward(ids: torch.Tensor) -> Picks:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        picks: Picks = logits[:, -1].argmax(-1).tolist()
        return picks

    step: Callable[[int], Picks] = lambda i: forward(rest[:, i, None])  # noqa: E731
    rate = timed(lambda: forward(first), step, len(made[0]), patience_s).decode_tokens_per_s
    assert rate is not None
    return rate


def _row(n: int, speeds: Speeds, failed: Failed) -> dict[str, Any]:
    ran = {name: spread(rates) for name, rates in speeds.items()}
    others = [ran[name]["median"] for name in PEERS if name in ran]
    return {
        "n_sequences": n,
        "tokens_per_s": ran,
        "unavailable": failed,
        "over_best": ran[OURS]["median"] / max(others) if others else None,
    }
