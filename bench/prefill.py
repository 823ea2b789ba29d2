"""Seconds to the first token by prompt length and chunk size, beside what the machine's matmuls and memory allow.

    python -m bench.prefill --demo
    python -m bench.prefill --synthetic qwen3-30b-a3b [--lengths 128,512,2048] [--chunks 128,512,2048]
    python -m bench.prefill --model FOLDER [--repeats 5] [--json FILE]

A chunk reads each expert it visits once, so a prompt in few chunks reads fewer bytes; and with many rows an expert
is bound by arithmetic. Operations are two per weight and row: of experts by the visits counted, of everything else
by the prompt's tokens, of the output layer for one; attention to the context is left out. Both limits are measured
before and after, the better counts. Prompts are random and new in every repeat. All cells take turns within each
repeat, on one engine, so that whatever else the machine does hits all alike; a first turn warms up.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import anyio

from bench import checkpoints, kernels, machine
from bench.kernels import Ceilings
from bench.report import Spread, command, finish, listing, result
from bench.workload import Workload
from fiddler import Engine, EngineConfig
from fiddler.lab.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run. A length beyond the model's context is cut to what leaves room for a token."""

    folder: Path
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    repeats: int
    set_bytes: int = kernels.SET_BYTES
    config: EngineConfig = field(default_factory=EngineConfig)


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


async def read_all(engine: Engine, cells: Grid, repeats: int, n_vocabulary: int) -> None:
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


def flop(shape: ModelShape, n_input: int, n_expert_rows: int) -> int:
    """Return the operations of reading a prompt of `n_input` tokens to its first token."""
    dense = shape.n_layers * shape.dense_weights + shape.n_dense_layers * shape.plain_weights
    return 2 * (n_input * dense + n_expert_rows * shape.expert_weights + shape.vocab * shape.hidden)


def measure(settings: Settings) -> dict[str, Any]:
    """Run everything and return the report. Raises `ConfigError` for a model whose sizes cannot be read."""
    shape = ModelShape.from_config(json.loads((settings.folder / "config.json").read_text()))
    before = kernels.ceilings_aside(settings.set_bytes)
    cells = anyio.run(_opened, settings, shape.vocab)
    best = before.or_better(kernels.ceilings_aside(settings.set_bytes))
    return result(
        "prefill",
        machine.describe(),
        virtual=False,
        settings={"model": settings.folder.name, "chunks": list(settings.chunks), "repeats": settings.repeats},
        gemm_flop_per_s=best.gemm,
        read_ceiling_gbs=best.gbs,
        ways_to_read=best.ways_to_read,
        cells=[cell(shape, best, *key, readings) for key, readings in cells.items()],
    )


async def _opened(settings: Settings, n_vocabulary: int) -> Grid:
    async with Engine(settings.folder, settings.config) as engine:
        cells = grid(settings.lengths, settings.chunks, engine.max_context)
        await read_all(engine, cells, settings.repeats, n_vocabulary)
    return cells


def cell(
    shape: ModelShape, best: Ceilings, n_input: int, chunk_tokens: int, readings: Sequence[Reading]
) -> dict[str, Any]:
    """Return what the repeats of one cell come to; rates are of the median time."""
    first_s = Spread.of(reading.first_token_s for reading in readings)
    expert_bytes = round(median(reading.expert_bytes for reading in readings))
    n_rows = round(median(reading.n_expert_rows for reading in readings))
    gbs = expert_bytes / first_s.median / 1e9
    flop_per_s = flop(shape, n_input, n_rows) / first_s.median
    return {
        "n_input": n_input,
        "chunk_tokens": chunk_tokens,
        "first_token_s": first_s,
        "tokens_per_s": n_input / first_s.median,
        "expert_bytes": expert_bytes,
        "gbs": gbs,
        "of_ceiling": gbs / best.gbs,
        "tflop_per_s": flop_per_s / 1e12,
        "of_gemm": flop_per_s / best.flop_per_s,
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("prefill", __doc__)
    checkpoints.add_options(parser)
    parser.add_argument("--lengths", type=_numbers, default="128,512,2048", help="of prompts, in tokens")
    parser.add_argument("--chunks", type=_numbers, default="128,512,2048", help="in tokens")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    folder = checkpoints.folder(options)
    settings = Settings(
        folder=folder,
        lengths=options.lengths,
        chunks=options.chunks,
        repeats=options.repeats,
        set_bytes=checkpoints.set_bytes(options, folder),
        config=checkpoints.config(options),
    )
    report = measure(settings)
    limits = (
        f"{folder.name}; limits measured in this run: large bf16 matmul "
        f"{report['gemm_flop_per_s'].high / 1e12:.2f} TFLOP/s, reading {report['read_ceiling_gbs']:.1f} GB/s"
    )
    finish(options, report, limits, listing("Reading a prompt", report["cells"]))


if __name__ == "__main__":
    main()
