"""A model without a checkpoint, opened and run: how fast memory is filled and tokens are made, how often slots hit.

    python -m bench.synthetic tiny [--tokens 16] [--device cpu|sim|sim:MACHINE|cuda]
    python -m bench.synthetic qwen3-30b-a3b[:layers=N] --device cuda [--sequences 4] [--json FILE]
    python -m bench.synthetic mixtral-8x7b --counts FILE      # visits of the real model, as popular as they were

Weights are random, prompts too, and routing is replayed: `tiny` replays the demo model's recorded one unless told,
other shapes what is drawn for them. Speeds are of decoding, from when every sequence has its first token, on the
engine's clock, which is virtual on a described machine; every repeat runs sequences of its own, on one engine. The
first takes whatever has to be done once, such as recording graphs, and is not counted where there are others.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import torch

from bench import machine
from bench.report import Spread, heading, result, table, write_json
from bench.synthetic.memory import in_memory
from bench.synthetic.routings import drawn, recorded
from bench.synthetic.shapes import SHAPES, Shape, shape
from fiddler import Engine, EngineConfig, FiddlerError, Statistics
from fiddler.cache.recorded import RoutingTrace
from fiddler.models.loaded import ServableModel
from fiddler.store.packed import PackedStore


@dataclass(frozen=True, slots=True)
class Workload:
    """What each repeat runs, side by side."""

    n_sequences: int
    n_prompt: int
    n_tokens: int
    repeats: int

    def prompts(self, repeat: int, n_vocabulary: int) -> list[list[int]]:
        """Return random prompts, others for each repeat."""
        random = torch.Generator().manual_seed(repeat)
        ids = torch.randint(n_vocabulary, (self.n_sequences, self.n_prompt), generator=random)
        prompts: list[list[int]] = ids.tolist()
        return prompts


@dataclass(slots=True)
class Making:
    """A loader that takes the time."""

    shape: Shape
    routing: RoutingTrace
    fill_s: float = 0.0
    dense_bytes: int = 0
    expert_bytes: int = 0
    block_bytes: int = 0
    dtype: str = ""

    def __call__(self, options: EngineConfig) -> ServableModel:
        """Make the model; filling is all of it: the dense part's memory and the experts'."""
        started = perf_counter()
        loaded = in_memory(self.shape, options, routing=self.routing)
        self.fill_s = perf_counter() - started
        store, model = loaded.store, loaded.model
        assert isinstance(store, PackedStore)
        self.dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.expert_bytes, self.block_bytes, self.dtype = store.nbytes, store.block_bytes, loaded.resolved.dtype
        return loaded


@dataclass(frozen=True, slots=True)
class Reading:
    """One repeat."""

    first_token_s: float
    """On the engine's clock, of the sequence that had it last."""
    tokens_per_s: float
    """Of all sequences together."""
    hit_share: float
    """Of the decoding's loads."""


def measure(making: Making, workload: Workload, config: EngineConfig, source: str) -> dict[str, Any]:
    """Open the model, run the workload, and return the report. Raises what opening raises.

    `source` says where its routing comes from.
    """
    readings, n_slots = anyio.run(_run, making, workload, config)
    counted = readings[1:] or readings
    shape, filled = making.shape, making.dense_bytes + making.expert_bytes
    return result(
        "synthetic",
        machine.describe(),
        virtual=config.device.startswith("sim:"),
        settings={
            "model": shape.name,
            "device": config.device,
            "routing": source,
            "n_sequences": workload.n_sequences,
            "prompt": workload.n_prompt,
            "new": workload.n_tokens,
            "repeats": workload.repeats,
        },
        model={
            "n_layers": shape.sizes.n_layers,
            "n_experts": shape.sizes.n_experts,
            "top_k": shape.sizes.top_k,
            "dtype": making.dtype,
            "dense_bytes": making.dense_bytes,
            "expert_bytes": making.expert_bytes,
            "block_bytes": making.block_bytes,
        },
        fill_s=making.fill_s,
        fill_gbs=filled / making.fill_s / 1e9,
        n_slots=n_slots,
        first_token_s=Spread.of(reading.first_token_s for reading in counted),
        tokens_per_s=Spread.of(reading.tokens_per_s for reading in counted),
        hit_share=Spread.of(reading.hit_share for reading in counted),
    )


async def _run(making: Making, workload: Workload, config: EngineConfig) -> tuple[list[Reading], int]:
    readings: list[Reading] = []
    async with Engine(making, config) as engine:
        for repeat in range(workload.repeats):
            prompts = workload.prompts(repeat, int(making.shape.config["vocab_size"]))
            readings.append(await _read(engine, prompts, workload.n_tokens))
        return readings, engine.statistics().n_slots


async def _read(engine: Engine, prompts: Sequence[list[int]], n_tokens: int) -> Reading:
    before = engine.statistics()
    begun: list[Statistics] = []

    async def consume(prompt: list[int]) -> None:
        first = True
        async for _ in engine.generate_stream(prompt, max_new_tokens=n_tokens, do_sample=False):
            if first:
                begun.append(engine.statistics())  # as of the step that made the token, or of one after it
            first = False

    async with anyio.create_task_group() as group:
        for prompt in prompts:
            group.start_soon(consume, prompt)
    return _reading(before, max(begun, key=lambda one: one.n_steps), engine.statistics())


def _reading(before: Statistics, begun: Statistics, after: Statistics) -> Reading:
    """Return what decoding came to; a reader that came too late to see it begin counts the prompts as well."""
    since = begun if after.n_new_tokens > begun.n_new_tokens else before
    n_loads = after.n_expert_loads - since.n_expert_loads
    return Reading(
        begun.step_s - before.step_s,
        (after.n_new_tokens - since.n_new_tokens) / (after.step_s - since.step_s),
        (after.n_hits - since.n_hits) / n_loads if n_loads else 0.0,
    )


def render(report: dict[str, Any]) -> str:
    """Return the report as text."""
    settings, model = report["settings"], report["model"]
    filled = model["dense_bytes"] + model["expert_bytes"]
    rows = [
        ("weights, GB", f"{filled / 1e9:.3f}"),
        ("of experts, GB", f"{model['expert_bytes'] / 1e9:.3f}"),
        ("memory filled in, s", f"{report['fill_s']:.2f}"),
        ("memory filled, GB/s", f"{report['fill_gbs']:.2f}"),
        ("slots", f"{report['n_slots']}"),
        ("first token, s", f"{report['first_token_s']:.4f}"),
        ("decoding, tokens/s", f"{report['tokens_per_s']:.2f}"),
        ("loads that hit a slot", f"{report['hit_share']:.3f}"),
    ]
    title = (
        f"{settings['model']} in {model['dtype']} on {settings['device']}, {settings['n_sequences']} of "
        f"{settings['prompt']} + {settings['new']} tokens, routing {settings['routing']}"
        f"{', virtual time' if report['virtual'] else ''}"
    )
    return "\n".join([heading(report["machine"]), table(title, ("", "median (least to most)"), rows)])


def routing_for(options: argparse.Namespace, of: Shape, workload: Workload) -> tuple[RoutingTrace, str]:
    """Return what to replay and what it is called. Raises `ConfigError`."""
    if options.trace is not None:
        return recorded(options.trace), options.trace.name
    if options.counts is None and of.name.partition(":")[0] == "tiny":
        return recorded(), "recorded with the demo model"
    n_sequences, n_tokens = workload.n_sequences * workload.repeats, workload.n_prompt + workload.n_tokens
    made = drawn(of, n_sequences, n_tokens, counts=options.counts)
    return made, f"drawn from {options.counts.name}" if options.counts is not None else "drawn"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", help=f"NAME[:layers=N], NAME one of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=64, help="that each sequence makes")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--sequences", type=int, default=1, help="side by side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="as EngineConfig has it (default: %(default)s)")
    parser.add_argument("--slots", type=int, help="experts the accelerator holds (default: the engine's choice)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the engine's choice)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, help="recorded routing of a model with such experts")
    source.add_argument("--counts", type=Path, help="visits of the real model, by layer and expert")
    parser.add_argument("--calibration-dir", type=Path, help="default: where the engine keeps it")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    workload = Workload(options.sequences, options.prompt, options.tokens, options.repeats)
    try:
        of = shape(options.spec)
        config = EngineConfig(
            device=options.device,
            slots=options.slots,
            threads=options.threads,
            calibration_dir=options.calibration_dir,
        )
        routing, source = routing_for(options, of, workload)
        report = measure(Making(of, routing), workload, config, source)
    except (FiddlerError, ValueError) as error:
        parser.error(str(error))
    print(render(report))
    if options.json is not None:
        write_json(options.json, report)
