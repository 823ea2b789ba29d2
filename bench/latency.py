"""Tokens per second of Fiddler and of what one would use instead, on the same weights in the same run.

    python bench/latency.py --demo
    python bench/latency.py --synthetic qwen3-30b-a3b --scenario single,concurrent,prefill
    python bench/latency.py --model FOLDER --scenario single --input-tokens paper --output-tokens paper --json FILE
    python bench/latency.py --model FOLDER --device sim:rtx4090-desktop   # a described machine, virtual time

Systems take turns within each repeat, so that whatever else the machine does hits all alike. Beside every speed
stands the share it is of what this machine could do at most, measured in the same run.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch

from bench import checkpoints, kernels, machine
from bench.contest import limits, shown
from bench.contest.contest import Contest, contest
from bench.contest.rates import Limit, Results, rows
from bench.kernels import Ceilings
from bench.peers.known import PEERS
from bench.report import command, finish, result
from bench.workload import PAPER, SCENARIOS, Sizes, workloads
from fiddler import ConfigError, EngineConfig

LIMIT_PASSES = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run."""

    folder: Path
    scenarios: tuple[str, ...]
    sizes: Sizes
    repeats: int
    peers: tuple[str, ...]
    set_bytes: int
    """How much is read to find a limit."""
    config: EngineConfig = field(default_factory=EngineConfig)


async def measure(settings: Settings) -> dict[str, Any]:
    """Run everything and return the report."""
    where = machine.describe()
    async with contest(settings.folder, settings.config, settings.peers) as found:
        asked = [
            Results(scenario, workload)
            for scenario in settings.scenarios
            for workload in workloads(scenario, settings.sizes, found.n_vocabulary)
        ]
        made: Ceilings | None = None
        for seed in range(settings.repeats + 1):
            made = await _better_ceilings(found, settings, made)
            for results in asked:
                await found.turn(results, seed)
        fields = (
            await found.probe.call(partial(_parts, found, asked, made, settings.set_bytes))
            if found.probe is not None and made is not None
            else {"systems": [row for results in asked for row in rows(results, None)]}
        )
        if found.probe is not None:  # the engine's own, while it is open
            where["threads"] = await found.probe.call(torch.get_num_threads)
    about = {
        "model": settings.folder.name,
        "device": settings.config.device,
        "repeats": settings.repeats,
        "compared": settings.peers,
        "kernels": settings.config.kernels,
    }
    return result("latency", where, virtual=found.virtual, settings=about, **fields)


async def _better_ceilings(found: Contest, settings: Settings, best: Ceilings | None) -> Ceilings | None:
    """Measure what this machine can do, on the engine's thread; nothing where time is not this machine's.

    Once a turn, and the best counts: a shared machine is faster in some minutes than in others.
    """
    if found.probe is None:
        return None
    now = await found.probe.call(partial(kernels.ceilings, settings.set_bytes, LIMIT_PASSES))
    return now if best is None else best.or_better(now)


def _parts(found: Contest, asked: Sequence[Results], made: Ceilings, set_bytes: int) -> dict[str, Any]:
    """Set everything beside its limits."""
    assert found.probe is not None
    sizes = limits.sizes(found.probe.loaded)
    made = made.also(limits.alone_gbs(asked))

    def limit(results: Results) -> Limit:
        return limits.of(sizes, results, made.gbs, made.flop_per_s)

    apart = [results for results in asked if results.steps]
    return {
        "model": asdict(sizes),
        "read_ceiling_gbs": made.gbs,
        "ways_to_read": made.ways_to_read,
        "gemm_flop_per_s": made.gemm,
        "systems": [row for results in asked for row in rows(results, limit(results))],
        "parts": [part for results in apart for part in limits.parts(sizes, made.gbs, results, set_bytes)],
        "overhead": [limits.overhead(sizes, results) for results in apart],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("latency", __doc__)
    checkpoints.add_options(parser)
    _add_options(parser)
    options = parser.parse_args(arguments)
    try:
        report = anyio.run(measure, _settings(options))
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    finish(options, report, shown.render(report))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, sim, sim:MACHINE (default: %(default)s)")
    what = "; ".join(f"{name}: {means}" for name, means in SCENARIOS.items())
    parser.add_argument(
        "--scenario", type=_scenarios, default=("single", "concurrent"), help=f"{what} (default: single,concurrent)"
    )
    parser.add_argument("--input-tokens", type=partial(_lengths, 0), default=(), help="N,N,… or paper")
    parser.add_argument("--output-tokens", type=partial(_lengths, 1), default=(), help="N,N,… or paper")
    parser.add_argument("--concurrency", type=_numbers, default=(8,), help="sequences (default: 8)")
    parser.add_argument("--beams", type=_numbers, default=(4,), help="of a search (default: 4)")
    parser.add_argument(
        "--compare", type=_names, default=tuple(PEERS), help=f"of {','.join(PEERS)}; or none (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (default: %(default)s)")
    parser.add_argument("--kernels", choices=("auto", "linear"), default="auto")


def _settings(options: argparse.Namespace) -> Settings:
    folder = checkpoints.folder(options)
    return Settings(
        folder=folder,
        scenarios=options.scenario,
        sizes=Sizes(options.input_tokens, options.output_tokens, options.concurrency, options.beams),
        repeats=options.repeats,
        peers=options.compare,
        set_bytes=checkpoints.set_bytes(options, folder),
        config=checkpoints.config(options, device=options.device, kernels=options.kernels),
    )


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


def _scenarios(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(SCENARIOS)}")
    return names


def _lengths(axis: int, text: str) -> tuple[int, ...]:
    return PAPER[axis] if text == "paper" else _numbers(text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,N,…") from error
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers begin at 1")
    return numbers


if __name__ == "__main__":
    main()
