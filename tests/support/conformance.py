"""What every device promises, whichever it is: the same few checks, for an engine opened with its options."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from fiddler import Engine, EngineConfig, Statistics
from tests.support.tiny import N_LAYERS, TOP_K

PROMPTS: Sequence[Sequence[int]] = ((5, 6, 7, 8, 9, 10, 11), (12,), (100, 3, 77, 4, 5, 60, 9, 31, 2, 8, 15, 44))
N_TOKENS = 14
Options = dict[str, Any]


def greedy(n: int = N_TOKENS) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=-1)


def reference(model: Path, **options: Any) -> list[list[int]]:
    """Return what transformers makes of the prompts, one after the other, with its own experts."""
    eager = AutoModelForCausalLM.from_pretrained(model, **options).eval()
    eager.set_experts_implementation("eager")
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=eager.device)
        with torch.no_grad():
            out = eager.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy())
        made.append(out[0, len(prompt) :].tolist())
    return made


async def together(engine: Engine, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """Return the engine's tokens for the prompts, run side by side."""
    made: dict[int, list[int]] = {}

    async def one(i: int) -> None:
        made[i] = list((await engine.generate(list(prompts[i]), greedy())).token_ids)

    async with anyio.create_task_group() as group:
        for i in range(len(prompts)):
            group.start_soon(one, i)
    return [made[i] for i in range(len(prompts))]


async def settled(engine: Engine) -> Statistics:
    """Wait until nothing is in flight. Raises `TimeoutError` if something stays."""
    with anyio.fail_after(60):
        while (now := engine.statistics()).n_running or now.n_waiting or now.kv_bytes or now.n_kv_tokens:
            await anyio.sleep(0.002)
    return now


async def gives_the_tokens_of_transformers(model: Path, options: Options, expected: list[list[int]]) -> None:
    async with Engine(model, EngineConfig(**options)) as engine:
        assert await together(engine) == expected
        assert await together(engine) == expected, "the second time, from a warm cache"


async def counts_every_visit(model: Path, options: Options) -> None:
    async with Engine(model, EngineConfig(**options)) as engine:
        await together(engine)
        now = await settled(engine)
    n_tokens = sum(map(len, PROMPTS)) + len(PROMPTS) * (N_TOKENS - 1)
    assert now.n_expert_rows == n_tokens * TOP_K * N_LAYERS
    assert (now.n_finished, now.n_failed, now.dead_lanes) == (len(PROMPTS), 0, ())
    assert now.n_slots_used <= now.n_slots


async def forgets_who_left(model: Path, options: Options, expected: list[list[int]]) -> None:
    async with Engine(model, EngineConfig(**options)) as engine:
        async with engine.generate_stream(list(PROMPTS[2]), greedy(200)) as stream:
            for _ in range(5):
                await anext(stream)
        with anyio.move_on_after(0.01):
            await engine.generate(list(PROMPTS[0]), greedy(200))
        assert await together(engine) == expected
        assert (await settled(engine)).n_failed == 0


async def cuts_prompts_without_a_trace(model: Path, options: Options, expected: list[list[int]]) -> None:
    async with Engine(model, EngineConfig(**{**options, "chunk_tokens": 5})) as engine:
        assert await together(engine) == expected


async def records_what_it_did(model: Path, options: Options, lanes: set[str]) -> None:
    async with Engine(model, EngineConfig(**options, trace=True, record=True)) as engine:
        await together(engine)
        await settled(engine)
        trace, routing = engine.trace(), engine.routing()
    assert {span.lane for span in trace.spans} >= lanes
    assert all(span.end_s >= span.start_s for span in trace.spans)
    assert len(trace.decisions) % N_LAYERS == 0
    assert all(decision.measured_s > 0.0 for decision in trace.decisions)
    rows = sorted(len(recording.experts) for recording in routing.recordings)
    assert rows == sorted(len(prompt) + N_TOKENS - 1 for prompt in PROMPTS)


Agrees = Callable[[Path, Options, list[list[int]]], Any]
AGREES: tuple[Agrees, ...] = (
    gives_the_tokens_of_transformers,
    forgets_who_left,
    cuts_prompts_without_a_trace,
)
"""What is held against transformers' tokens."""
