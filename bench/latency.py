"""Tokens per second of a whole model, and how near each part of a step comes to what the machine allows.

    python -m bench.latency --synthetic qwen3-30b-a3b --compare eager,batched_mm,grouped_mm
    python -m bench.latency --model FOLDER [--input-tokens 64] [--output-tokens 64] [--repeats 5] [--json FILE]
    python -m bench.latency --demo --concurrency 1,8

Systems take turns within each repeat, so that whatever else the machine does hits all alike.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import anyio
import torch
from transformers import PreTrainedModel

import fiddler
from bench import kernels, limits, machine, ours, peers
from bench.report import Spread, heading, table, write_json
from bench.workload import Run, Step, Unavailable, Workload, decoding
from fiddler import Engine, EngineConfig
from tools import synthesize

OURS = "fiddler"
PEERS = ("eager", "batched_mm", "grouped_mm")
CACHE = Path.home() / ".cache" / "fiddler-bench"
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run."""

    folder: Path
    n_input: int
    n_output: int
    repeats: int
    concurrency: tuple[int, ...]
    compare: tuple[str, ...]
    set_bytes: int = kernels.SET_BYTES
    config: EngineConfig = field(default_factory=EngineConfig)


@dataclass(slots=True)
class Results:
    """What was seen at one concurrency."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    """By system."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a system did not run, by system."""
    steps: list[Step] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    """Seconds of each step's expert kernels, run again with nothing around them."""

    def add(self, system: str, outcome: Run | Unavailable) -> None:
        """Note what a system did."""
        if isinstance(outcome, Run):
            self.runs.setdefault(system, []).append(outcome)
        else:
            self.unavailable[system] = outcome.reason


async def measure(settings: Settings) -> dict[str, Any]:
    """Run everything and return the report."""
    results = {n: Results() for n in settings.concurrency}
    async with Engine(settings.folder, settings.config) as engine:
        probe = ours.Probe(engine)
        ways = await probe.call(lambda: kernels.read_ceiling(settings.set_bytes))
        model: PreTrainedModel | Unavailable = Unavailable("not asked for")
        if settings.compare:
            model = await probe.call(lambda: peers.load(settings.folder))
        loads = {n: _workload(probe, n, settings) for n in settings.concurrency}
        for seed in range(settings.repeats + 1):
            for n, workload in loads.items():
                await _turn(engine, probe, model, workload, seed, settings.compare, results[n])
        return await probe.call(lambda: _report(settings, results, limits.sizes(probe.loaded), ways))


def _report(
    settings: Settings, results: dict[int, Results], sizes: limits.Sizes, before: dict[str, Spread]
) -> dict[str, Any]:
    """Measure the limits, again or for the first time, and put everything together."""
    ways = limits.better(before, kernels.read_ceiling(settings.set_bytes))
    parts = {
        n: limits.parts(sizes, kernels.ceiling(ways), n, r.steps, r.alone_s, settings.set_bytes)
        for n, r in results.items()
    }
    return {
        "bench": "latency",
        "machine": machine.describe(),
        "settings": {
            "model": settings.folder.name,
            "input_tokens": settings.n_input,
            "output_tokens": settings.n_output,
            "repeats": settings.repeats,
        },
        "model": sizes,
        "read_ceiling_gbs": kernels.ceiling(ways),
        "ways_to_read": ways,
        "systems": [row for n, r in results.items() for row in _systems(n, r)],
        "parts": [part for n in results for part in parts[n]],
        "overhead": [limits.overhead(sizes, n, r.steps, r.alone_s) for n, r in results.items()],
    }


def _workload(probe: ours.Probe, n_sequences: int, settings: Settings) -> Workload:
    embedding: Any = probe.loaded.model.get_input_embeddings()
    return Workload(n_sequences, settings.n_input, settings.n_output, embedding.num_embeddings)


async def _turn(
    engine: Engine,
    probe: ours.Probe,
    model: PreTrainedModel | Unavailable,
    workload: Workload,
    seed: int,
    compare: Sequence[str],
    results: Results,
) -> None:
    """Let every system run the workload once; turn 0 warms up, and is not counted."""
    if seed == 0:
        workload = Workload(workload.n_sequences, workload.n_input, WARM_UP_TOKENS, workload.n_vocabulary)
    probe.steps.clear()
    run = await ours.run(engine, workload, seed)
    steps = decoding(probe.steps, workload.n_sequences)
    outcomes: dict[str, Run | Unavailable] = {OURS: run}
    for name in compare:
        outcomes[name] = (
            model
            if isinstance(model, Unavailable)
            else await probe.call(partial(peers.run, model, name, workload, workload.prompts(seed), run.tokens))
        )
    if seed:
        results.steps += steps
        results.alone_s += await probe.call(lambda: ours.alone(probe, steps))
        for system, outcome in outcomes.items():
            results.add(system, outcome)


def _systems(n_sequences: int, results: Results) -> list[dict[str, Any]]:
    """Summarise every system, with its time as a multiple of Fiddler's."""
    base = median(run.decode_tokens_per_s for run in results.runs[OURS])
    rows: list[dict[str, Any]] = []
    for system, runs in results.runs.items():
        whole = [r.tokens_per_s for r in runs if r.tokens_per_s is not None]
        firsts = [r.first_token_s for r in runs if r.first_token_s is not None]
        decode = Spread.of(r.decode_tokens_per_s for r in runs)
        rows.append(
            {
                "system": system,
                "concurrency": n_sequences,
                "tokens_per_s": Spread.of(whole) if whole else None,
                "decode_tokens_per_s": decode,
                "first_token_s": Spread.of(firsts) if firsts else None,
                "fiddler_is_times": base / decode.median,
                "unavailable": None,
            }
        )
    for system, reason in results.unavailable.items():
        rows.append({"system": system, "concurrency": n_sequences, "unavailable": reason})
    return rows


def render(report: dict[str, Any]) -> str:
    """Return the report as text."""
    sizes, settings, limit = report["model"], report["settings"], report["read_ceiling_gbs"]
    ran = [s for s in report["systems"] if s["unavailable"] is None]
    lines = [
        heading(report["machine"]),
        f"{settings['model']}: {sizes.n_layers} MoE layers, experts {sizes.expert_bytes / 1e9:.2f} GB, "
        f"read per token outside experts {(sizes.dense_bytes + sizes.head_bytes) / 1e6:.0f} MB; "
        f"{settings['input_tokens']} tokens in, {settings['output_tokens']} out, {settings['repeats']} repeats",
        f"read ceiling of this machine, measured in this run: {limit:.1f} GB/s",
        table(
            "Whole model",
            ("system", "concurrent", "tokens/s", "decoding tokens/s", "first token s", "fiddler is"),
            [
                (
                    s["system"],
                    str(s["concurrency"]),
                    f"{s['tokens_per_s']:.1f}" if s["tokens_per_s"] else "-",
                    f"{s['decode_tokens_per_s']:.1f}",
                    f"{s['first_token_s']:.3f}" if s["first_token_s"] else "-",
                    f"{s['fiddler_is_times']:.2f}x",
                )
                for s in ran
            ],
        ),
        *(
            f"{s['system']} at {s['concurrency']}: did not run: {s['unavailable']}"
            for s in report["systems"]
            if s["unavailable"] is not None
        ),
        table(*limits.parts_table(report["parts"])),
        table(*limits.overhead_table(report["overhead"])),
        *_batching(ran),
    ]
    return "\n".join(lines)


def _batching(ran: Sequence[dict[str, Any]]) -> list[str]:
    """Say how much more concurrent requests make than one."""
    rates = {s["concurrency"]: s["decode_tokens_per_s"].median for s in ran if s["system"] == OURS}
    if 1 not in rates:
        return []
    return [
        f"\n{n} concurrent requests make {r / rates[1]:.2f}x the tokens of one" for n, r in rates.items() if n > 1
    ]


def _folder(options: argparse.Namespace) -> Path:
    if options.demo:
        return fiddler.DEMO
    if options.model:
        return Path(options.model)
    spec: str = options.synthetic
    return synthesize.write(synthesize.config_of(spec), options.cache / spec.replace(":", "-"))


def _set_bytes(folder: Path) -> int:
    """Return how much to read to find a limit: a model that fits in the cache is read from there."""
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return min(kernels.SET_BYTES, max(n_bytes, 16 << 20))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a checkpoint folder")
    source.add_argument("--synthetic", help="random weights: qwen3-30b-a3b[:layers=N] or mixtral-8x7b[:layers=N]")
    source.add_argument("--demo", action="store_true", help="the demo model that ships with Fiddler")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="for synthetic checkpoints (default: %(default)s)"
    )
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--compare", default="", help=f"transformers' experts, of {','.join(PEERS)}")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--kernels", choices=("auto", "linear"), default="auto")
    parser.add_argument("--calibration-dir", type=Path, help="default: where the engine keeps it")
    parser.add_argument("--set-mib", type=int, help="MiB read to find a limit (default: the model's, at most 768)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = _folder(options)
    settings = Settings(
        folder=folder,
        n_input=options.input_tokens,
        n_output=options.output_tokens,
        repeats=options.repeats,
        concurrency=tuple(int(n) for n in options.concurrency.split(",")),
        compare=tuple(name for name in options.compare.split(",") if name),
        set_bytes=options.set_mib << 20 if options.set_mib else _set_bytes(folder),
        config=EngineConfig(
            threads=options.threads, kernels=options.kernels, calibration_dir=options.calibration_dir
        ),
    )
    report = anyio.run(measure, settings)
    print(render(report))
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
