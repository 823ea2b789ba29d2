"""An engine reads random prompts to their first tokens, in chunks of several sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.contest.workload import Workload
from fiddler import Engine


@dataclass(frozen=True, slots=True)
class Reading:
    """One prompt read to its first token."""

    first_token_s: float
    expert_bytes: int
    """Of weights, as often as they were read."""
    n_expert_rows: int
    """Visits of a token to an expert."""


Grid = dict[tuple[int, int], list[Reading]]
"""By (prompt length, chunk size)."""


def grid(lengths: Sequence[int], chunks: Sequence[int], max_context: int) -> Grid:
    """Return the cells to run, empty: of the chunks that hold a whole prompt only the smallest."""
    cells: Grid = {}
    for length in dict.fromkeys(min(length, max_context - 1) for length in lengths):
        smaller = [chunk for chunk in chunks if chunk < length]
        whole = [chunk for chunk in chunks if chunk >= length]
        cells |= {(length, chunk): [] for chunk in (*smaller, *sorted(whole)[:1])}
    return cells


async def read(engine: Engine, cells: Grid, repeats: int, n_vocabulary: int) -> None:
    """Let an engine read a prompt for every cell in each repeat and in a first one, which warms up.

    The cells of one length read the same prompts.
    """
    for seed in range(repeats + 1):
        for (n_input, chunk_tokens), readings in cells.items():
            (prompt,) = Workload(1, n_input, 1, n_vocabulary).prompts(seed)
            _cut(engine, chunk_tokens)
            reading = await _read(engine, prompt)
            if seed:
                readings.append(reading)


def _cut(engine: Engine, chunk_tokens: int) -> None:
    """Let an idle engine cut prompts otherwise: engines side by side would share the cores among their threads."""
    assert engine._loop is not None
    engine._loop._chunk_tokens = chunk_tokens


async def _read(engine: Engine, prompt: list[int]) -> Reading:
    before = engine.statistics()
    made = await engine.generate(prompt, max_new_tokens=1, do_sample=False)
    after = engine.statistics()
    return Reading(
        made.timing.first_token_s,
        after.expert_bytes - before.expert_bytes,
        after.n_expert_rows - before.n_expert_rows,
    )
