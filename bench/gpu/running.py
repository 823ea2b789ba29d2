"""Requests run on an open engine, and what its lanes read meanwhile."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import anyio

from fiddler import Engine, Statistics
from fiddler.cost.model import LANES


@dataclass(frozen=True, slots=True)
class Reading:
    """Some sequences, started together."""

    first_token_s: float
    """From when they were asked for to when each had its first token."""
    tokens_per_s: float | None
    """Tokens after that, of all sequences, over the time from there to the last; `None` where there are none."""
    tokens: list[list[int]]
    """Of each sequence."""
    n_tokens: int
    """That came after all had their first."""
    read_bytes: dict[str, float]
    """By lane, experts' bytes for each of those tokens."""
    busy_s: dict[str, float]
    """By lane, for each of those tokens."""
    hits: float | None
    """Of the experts run, the share that was in a slot or on its way into one. `None` where the host does not hear
    of them, since every expert is in a slot."""


def prompts(n: int, n_tokens: int, n_vocabulary: int, seed: int) -> list[list[int]]:
    """Return random prompts, the same for the same seed."""
    source = random.Random(f"{seed} {n} {n_tokens}")
    return [[source.randrange(n_vocabulary) for _ in range(n_tokens)] for _ in range(n)]


async def read(engine: Engine, asked: Sequence[list[int]], n_new: int, patience_s: float) -> Reading:
    """Run prompts side by side, until each has `n_new` tokens or, after its second, patience is lost.

    Raises what the engine raises.
    """
    times: list[list[float]] = [[] for _ in asked]
    tokens: list[list[int]] = [[] for _ in asked]
    marks: list[Statistics] = []
    began = perf_counter()

    async def consume(number: int) -> None:
        options: dict[str, Any] = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": []}
        async with engine.generate_stream(asked[number], **options) as stream:
            async for token in stream:
                times[number].append(token.made_s)
                tokens[number].append(token.id)
                if len(times[number]) == 1 and all(times):
                    marks.append(engine.statistics())
                if len(times[number]) > 1 and times[number][-1] - began > patience_s:
                    return

    async with anyio.create_task_group() as group:
        for number in range(len(asked)):
            group.start_soon(consume, number)
    return _reading(tokens, times, began, marks[0], engine.statistics())


def _reading(
    tokens: list[list[int]], times: list[list[float]], began: float, before: Statistics, after: Statistics
) -> Reading:
    """Bytes are those of all tokens that the engine made between, some of which nobody waited for."""
    first = max(own[0] for own in times)
    later = [at for own in times for at in own if at > first]
    n = max(after.n_new_tokens - before.n_new_tokens, 1)
    lanes = {lane: (getattr(before, lane), getattr(after, lane)) for lane in LANES}
    n_loads = after.n_expert_loads - before.n_expert_loads
    return Reading(
        first_token_s=first - began,
        tokens_per_s=len(later) / (max(later) - first) if later else None,
        tokens=tokens,
        n_tokens=len(later),
        read_bytes={lane: (b.n_bytes - a.n_bytes) / n for lane, (a, b) in lanes.items()},
        busy_s={lane: (b.busy_s - a.busy_s) / n for lane, (a, b) in lanes.items()},
        hits=(after.n_hits - before.n_hits) / n_loads if n_loads else None,
    )
