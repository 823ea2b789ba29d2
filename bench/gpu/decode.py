"""Decoding and first tokens of models of full size, by memory and by system, in turns.

A turn opens an engine, warms it up, takes readings and closes it; all systems have their turn before any has its
second, as long as there is time. The rule for caches is the same for all: one sequence makes `n_warm` tokens, or as
many as patience lets it, before anything counts. Readings of one number are never of one sequence twice: each has
another recording of the routing, and every system has the same ones in the same order.
"""

from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any
from unittest.mock import patch

import anyio

from bench.gpu.clock import spread
from bench.gpu.context import Context, said
from bench.gpu.facts import Rates, rates_of
from bench.gpu.models import sizes_of, vocabulary
from bench.gpu.running import Reading, prompts, read
from fiddler import Engine
from fiddler.cache.cache import ExpertCache
from fiddler.cost.model import LANES
from fiddler.engine import assembly
from fiddler.lab.shape import ModelShape
from fiddler.lab.simulation import Bound
from fiddler.lab.systems import System, cache_of, planner, prefetch_of, system
from fiddler.scheduler import core

RESERVE_S = 240.0
"""Left of the run for the parts after this one; of a shorter run no more than a third."""
N_WARM_TOGETHER = 6
"""Tokens of each sequence that warm up what several sequences together need, such as graphs of their own."""
OURS = "fiddler"
LONG_S = 12.0
"""A prompt that would take longer, going by the one before, is left out."""
Place = tuple[str, float]
"""A model and its memory in GiB."""


@dataclass(slots=True)
class _Cell:
    """What is known of a system at a place."""

    n_slots: int = 0
    gpu_bytes: int = 0
    """That the GPU had less free while the engine was open, beside what was free before."""
    opening_s: list[float] = field(default_factory=list)
    decoded: dict[int, list[Reading]] = field(default_factory=lambda: defaultdict(list))
    first_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    unavailable: str | None = None

    def about(self) -> dict[str, Any]:
        """Return all but the readings."""
        opening_s = spread(self.opening_s) if self.opening_s else None
        about = {"n_slots": self.n_slots, "gpu_bytes": self.gpu_bytes, "unavailable": self.unavailable}
        return {**about, "n_turns": len(self.opening_s), "opening_s": opening_s}


@dataclass(slots=True)
class Decoding:
    """All readings of a run."""

    ctx: Context
    rates: Rates
    cells: dict[tuple[str, float, str], _Cell] = field(default_factory=lambda: defaultdict(_Cell))

    def place(self, place: Place, until_s: float) -> None:
        """Give every system its turns; the first round is whole whatever time is left, unless the run is over."""
        sizes = self.ctx.sizes
        for number in range(sizes.rounds):
            began_s = perf_counter()
            for name in sizes.systems:
                if self.ctx.remaining_s() > 0.0:
                    self._turn(place, name, first=number == 0)
                elif not number:
                    self.cells[*place, name].unavailable = "the run's time was over"
                self.write()
            if perf_counter() + (perf_counter() - began_s) > until_s:
                return

    def write(self) -> None:
        """Write what is known so far."""
        self.ctx.keep("decode", **self.rows())

    def rows(self) -> dict[str, Any]:
        """Return every cell's rows."""
        found: dict[str, list[dict[str, Any]]] = {"places": [], "decode": [], "first_token": []}
        for (spec, budget, name), cell in self.cells.items():
            place = {"model": spec, "budget_gib": budget, "system": name}
            found["places"].append({**place, "n_experts": sizes_of(spec).total_experts, **cell.about()})
            found["decode"] += ({**place, **row} for row in self._decoded(spec, cell))
            found["first_token"] += (
                {**place, "n_prompt": n_prompt, "n_readings": len(seconds), "first_token_s": spread(seconds)}
                for n_prompt, seconds in cell.first_s.items()
            )
        return found

    def _turn(self, place: Place, name: str, *, first: bool) -> None:
        cell = self.cells[*place, name]
        if cell.unavailable is not None:
            return
        try:
            with deciding_as(name, sizes_of(place[0]).top_k):
                anyio.run(self._open, place, name, cell, first)
        except Exception as error:  # whatever it is, the other systems go on
            cell.unavailable = said(error)
        finally:
            self.ctx.shelf.tidy()

    async def _open(self, place: Place, name: str, cell: _Cell, first: bool) -> None:
        ctx, (spec, budget) = self.ctx, place
        free, began_s = ctx.gpu.memory().free, perf_counter()
        async with Engine(ctx.shelf.loader(spec), ctx.engine(budget, **options_of(name))) as engine:
            cell.opening_s.append(perf_counter() - began_s)
            cell.n_slots = engine.statistics().n_slots
            asking = _Asking(engine, ctx, vocabulary(spec))
            await asking.run(1, ctx.sizes.n_warm)
            cell.gpu_bytes = max(free - ctx.gpu.memory().free, 0)
            for n in ctx.sizes.n_sequences if first else ctx.sizes.n_sequences[:1]:
                if n > 1:
                    await asking.run(n, N_WARM_TOGETHER)
                for _ in range(ctx.sizes.repeats):
                    cell.decoded[n].append(await asking.run(n, ctx.sizes.n_new))
            if first:
                await _firsts(asking, ctx, cell)

    def _decoded(self, spec: str, cell: _Cell) -> Iterator[dict[str, Any]]:
        for n, every in cell.decoded.items():
            readings = [reading for reading in every if reading.tokens_per_s is not None]
            if not readings:
                continue
            known = [reading.hits for reading in readings if reading.hits is not None]
            yield {
                "n_sequences": n,
                "n_readings": len(readings),
                "tokens_per_s": spread(r.tokens_per_s for r in readings if r.tokens_per_s is not None),
                "hits": spread(known) if known else None,
                "read_bytes_per_token": {
                    lane: spread(reading.read_bytes[lane] for reading in readings) for lane in LANES
                },
                **self._of_bound(spec, n, readings),
            }

    def _of_bound(self, spec: str, n: int, readings: list[Reading]) -> dict[str, Any]:
        if not all(knows_bytes(reading, n) for reading in readings):
            return {"of_bound": None, "bound_s": None}
        shape, n_prompt = sizes_of(spec), self.ctx.sizes.n_prompt
        found = [bound(r, shape, n, n_prompt + (1 + r.n_tokens / n) / 2, self.rates) for r in readings]
        shares = [b.seconds * (r.tokens_per_s or 0.0) for b, r in zip(found, readings, strict=True)]
        lanes = {lane: spread(getattr(b, f"{lane}_s") for b in found) for lane in LANES}
        return {"of_bound": spread(shares), "bound_s": lanes}


@dataclass(slots=True)
class _Asking:
    """Prompts of one engine, none of them twice."""

    engine: Engine
    ctx: Context
    n_vocabulary: int
    n_asked: int = 0

    async def run(self, n: int, n_new: int, n_prompt: int | None = None) -> Reading:
        """Run `n` sequences."""
        self.n_asked += 1
        sizes = self.ctx.sizes
        asked = prompts(n, n_prompt or sizes.n_prompt, self.n_vocabulary, self.n_asked)
        return await read(self.engine, asked, n_new, sizes.patience_s)


async def _firsts(asking: _Asking, ctx: Context, cell: _Cell) -> None:
    """Time first tokens, the shortest prompt first.

    Where it is quick the first of a length warms up and the second counts: kernels are chosen by rows.
    """
    rate = 0.0
    for n_prompt in sorted(ctx.sizes.first_token):
        if rate * n_prompt > min(LONG_S, ctx.remaining_s()):
            return
        taken = (await asking.run(1, 1, n_prompt)).first_token_s
        if taken < LONG_S / 4:
            taken = (await asking.run(1, 1, n_prompt)).first_token_s
        cell.first_s[n_prompt].append(taken)
        rate = taken / n_prompt


def decode(ctx: Context) -> dict[str, Any]:
    """Measure every place, those of one model together."""
    decoding = Decoding(ctx, rates_of(ctx))
    places = [(spec, budget) for spec in ctx.sizes.models for budget in ctx.sizes.budgets_gib]
    reserve_s = min(RESERVE_S, ctx.sizes.minutes * 20.0)
    for number, place in enumerate(places):
        left_s = ctx.remaining_s(reserve_s)
        decoding.place(place, perf_counter() + left_s / (len(places) - number))
    return decoding.rows()


def options_of(name: str) -> dict[str, Any]:
    """Return the options of `EngineConfig` that a system has of its own. Raises `ConfigError`."""
    placed = system(name)
    chosen = {"half_life": placed.half_life, "promote": placed.promote, "waves": placed.waves}
    return chosen | ({"slots": 0} if placed.order == "nobody" else {})


@contextmanager
def deciding_as(name: str, top_k: int) -> Generator[None]:
    """Have engines that are opened meanwhile decide by a system's rules, which are the lab's, no engine option.

    One engine, one cache, one set of kernels, other decisions. Not as in the originals: fiddler-2024 overlaps CPU
    and GPU, and places experts uniformly and not by popularity; who streams experts through buffers of its own
    passes them through our cache, which admits by its policy; ktransformers' one graph a step, AMX kernels
    and deferral are not there.
    """
    placed = system(name)

    def cache(_: str, n_slots: int, n_experts: tuple[int, ...], *, half_life: float) -> ExpertCache:
        ours = replace(System(), policy=placed.policy, half_life=half_life)
        return cache_of(ours, n_slots, n_experts, top_k)

    with (
        patch.object(assembly, "make_cache", cache),
        patch.object(core, "PLANNERS", {"auto": planner(placed.planner)}),
        patch.object(core, "PREFETCH", {"auto": lambda cache: prefetch_of(placed.prefetch, cache)}),
    ):
        yield


def bound(reading: Reading, shape: ModelShape, n_sequences: int, context: float, per_s: Rates) -> Bound:
    """Return the bound for a token; `context` is the mean number of tokens that a sequence attends to.

    The longest of three reads of the bytes that were really read, each at its full rate: the ceilings that `facts`
    measures in the same run. The CPU and the link share one memory, which is not counted. The dense part counts
    once a step, less the embedding, of which a token reads a row; keys and values once a step and sequence.
    """
    dense = shape.resident_bytes - (0 if shape.tied else shape.head_bytes)
    kept = n_sequences * context * (shape.n_layers + shape.n_dense_layers) * shape.kv_bytes_per_token
    read = reading.read_bytes
    return Bound(
        read["cpu"] / per_s.cpu,
        # A promotion counts when it starts, and may still be under way at the end: no more than was moved.
        min(read["link"] / per_s.link, reading.busy_s["link"]),
        (_gpu_bytes(reading, shape, n_sequences) + (dense + kept) / n_sequences) / per_s.gpu,
    )


def _gpu_bytes(reading: Reading, shape: ModelShape, n_sequences: int) -> float:
    """Return the experts' bytes that the GPU read for a token.

    Where every expert is in a slot nobody counts them; for one sequence they are known all the same.
    """
    if reading.hits is None and n_sequences == 1:
        return shape.n_layers * shape.top_k * shape.expert_bytes
    return reading.read_bytes["gpu"]


def knows_bytes(reading: Reading, n_sequences: int) -> bool:
    """Whether a reading says what was read."""
    return reading.hits is not None or n_sequences == 1
