"""Greedy tokens of tiny models, beside what transformers would pick on the same GPU after the same tokens.

Random weights, in bfloat16 and, for one way to run, in float32. Both sides are greedy; each token of ours is held
against transformers' logits after the same tokens before it, so that one difference does not make all later ones
differ. Where ours is another than theirs, the margin is how much lower its logit is than the highest, in standard
deviations of the logits. What is tolerated as rounding:

- in float32 `FLOAT32`;
- in bfloat16 `BFLOAT16`, or what bfloat16 does to transformers itself, if that is more: the most that a logit
  changes between its bfloat16 and its float32, after the same tokens. A router with two experts nearly alike may
  turn to the other for the last of eight bits, and then much changes. What is wrong and not rounded shows in
  float32.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.gpu.context import Context
from bench.gpu.running import prompts
from fiddler import Engine
from tests.support.tiny import N_EXPERTS, N_LAYERS, save_tiny

ARCHITECTURES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe")
FLOAT32, BFLOAT16 = 1e-3, 0.05
"""In standard deviations; that of bfloat16 as in `tests/gpu`."""
WAYS: dict[str, dict[str, Any]] = {
    "every expert there": {},
    "some there": {"slots": N_EXPERTS * N_LAYERS // 3},
    "all fetched": {"slots": N_EXPERTS * N_LAYERS // 3, "planner": "all-fetch"},
    "none there": {"slots": 0},
    "without graphs": {"slots": N_EXPERTS * N_LAYERS // 3, "graphs": False},
    "in float32": {"slots": N_EXPERTS * N_LAYERS // 3, "dtype": "float32"},
}
"""Options of the engine, by name."""
N_PROMPTS, N_PROMPT = 3, 12
N_VOCABULARY = 200
"""Below every tiny model's."""


def agreement(ctx: Context) -> dict[str, Any]:
    """Compare every architecture in every way."""
    rows: list[dict[str, Any]] = []
    asked = prompts(N_PROMPTS, N_PROMPT, N_VOCABULARY, 0)
    for name in ARCHITECTURES:
        folder = save_tiny(ctx.scratch / name, name, dtype=torch.bfloat16)
        ways = {way: WAYS[way] for way in ctx.sizes.ways or WAYS}
        ours = {way: anyio.run(partial(_made, ctx, folder, asked, options)) for way, options in ways.items()}
        ctx.shelf.tidy()
        theirs = {dtype: _reference(folder, dtype, ctx) for dtype in (torch.bfloat16, torch.float32)}
        for way, made in ours.items():
            rows.append({"architecture": name, "way": way, **_compared(theirs, way == "in float32", asked, made)})
    return {"n_tokens": ctx.sizes.n_agree, "n_prompts": N_PROMPTS, "rows": rows}


def _reference(folder: Path, dtype: torch.dtype, ctx: Context) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(ctx.gpu.device).eval().set_experts_implementation("eager")
    return model


async def _made(
    ctx: Context, folder: Path, asked: Sequence[list[int]], options: dict[str, Any]
) -> list[tuple[int, ...]]:
    """Return an engine's tokens, of all prompts side by side."""
    made: dict[int, tuple[int, ...]] = {}
    chosen = {"max_context": None, "kv_tokens": N_PROMPTS * (N_PROMPT + ctx.sizes.n_agree), **options}
    async with Engine(folder, ctx.engine(**chosen)) as engine:

        async def one(number: int) -> None:
            result = await engine.generate(
                asked[number], max_new_tokens=ctx.sizes.n_agree, do_sample=False, eos_token_id=[]
            )
            made[number] = result.token_ids

        async with anyio.create_task_group() as group:
            for number in range(len(asked)):
                group.start_soon(one, number)
    return [made[number] for number in range(len(asked))]


@torch.inference_mode()
def _compared(
    theirs: Mapping[torch.dtype, Any], exact: bool, asked: Sequence[list[int]], made: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return how many tokens are theirs too, the first that is not, the largest margin, and what is tolerated."""
    n_equal, n_tokens, first, most, tolerance = 0, 0, None, 0.0, FLOAT32 if exact else BFLOAT16
    for number, (prompt, tokens) in enumerate(zip(asked, made, strict=True)):
        logits = {dtype: _logits(model, prompt, tokens) for dtype, model in theirs.items()}
        chosen = torch.tensor(tokens)
        margins = _margins(logits[torch.float32 if exact else torch.bfloat16], chosen)
        if not exact:
            tolerance = max(tolerance, _change(logits[torch.bfloat16], logits[torch.float32]))
        n_tokens += len(tokens)
        n_equal += sum(margin == 0.0 for margin in margins)
        most = max(most, *margins)
        at = next((place for place, margin in enumerate(margins) if margin > 0.0), None)
        if first is None and at is not None:
            first = {"prompt": number, "token": at, "margin": margins[at]}
    return {
        "n_tokens": n_tokens,
        "n_equal": n_equal,
        "first_difference": first,
        "largest_margin": most,
        "tolerance": tolerance,
        "agrees": most <= tolerance,
    }


def _logits(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Return what a model thinks before each token, `[n, V]` on the host."""
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    logits: Tensor = model(ids).logits[0, len(prompt) - 1 : -1].float().cpu()
    return logits


def _margins(logits: Tensor, chosen: Tensor) -> list[float]:
    """Return how far each chosen token's logit is below the highest, in standard deviations."""
    best, own = logits.max(dim=-1).values, logits.gather(1, chosen[:, None])[:, 0]
    margins: list[float] = ((best - own) / logits.std(dim=-1)).tolist()
    return margins


def _change(rounded: Tensor, exact: Tensor) -> float:
    """Return the most that a logit changes, in standard deviations."""
    return float(((rounded - exact).abs().max(dim=-1).values / exact.std(dim=-1)).max())
