"""Whole systems side by side, simulated: tokens per second by every peer's rules and by ours, and what bytes allow.

    python -m bench.policies [--models NAME …] [--machines NAME …] [--systems NAME …] [--json FILE]

In virtual time, on made-up routing: `fitted` to what is published of real models and used for no tuning, or
`looser`, on which ours was tuned. Every system begins with the experts in its slots that other text visited most.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, product
from statistics import geometric_mean

from bench import machine
from bench.report import command, finish, result, side_by_side, table
from fiddler.cache.policy import Key
from fiddler.lab.machine import Machine, n_slots
from fiddler.lab.policies import by_popularity
from fiddler.lab.shape import FLOATS, ModelShape
from fiddler.lab.simulation import Setting, simulate
from fiddler.lab.synthetic import PUBLISHED, Habits, SyntheticRouting
from fiddler.lab.systems import SYSTEMS
from fiddler.recording import Recording, guesses

OURS, ORIGINAL = "fiddler", "fiddler-2024"
DESKTOP = "rtx4090-desktop"
MODELS = ("deepseek-v2-lite", "gpt-oss-20b", "mixtral-8x7b", "qwen3-30b-a3b")
"""Shapes whose experts are all simulated in bf16; `bench.formats` has the packed ones."""
MACHINES = (DESKTOP, "laptop-4060", "fiddler-env1", "fiddler-env2", "h100-server")
ROUTINGS = {"fitted": PUBLISHED, "looser": Habits()}


@dataclass(frozen=True, slots=True)
class Place:
    """What is simulated, whoever decides."""

    routing: str
    model: str
    machine: str
    resident: float
    n_sequences: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One system in one place."""

    place: Place
    system: str
    tokens_per_s: float
    of_bound: float
    """Share of the time taken that the longest of its reads would take at its full rate."""
    of_chain: float
    """The same of those reads in the order in which layers need them."""
    first_token_s: float
    hits: float
    """Share of the loads of decoding, as the next two."""
    on_cpu: float
    fetched: float
    n_ahead: int
    n_ahead_used: int
    n_ahead_landed: int


@dataclass(frozen=True, slots=True)
class Work:
    """How much is run: tokens of each prompt, and made after it."""

    prompt: int
    new: int


def places(options: argparse.Namespace) -> Iterator[Place]:
    """Yield the grid: everything on the desktop, other machines and the looser routing with fewer cells."""
    desktop = product(["fitted"], options.models, [DESKTOP], (0.125, 0.25, 0.5), (1, 4))
    others = product(["fitted"], options.models, [name for name in MACHINES if name != DESKTOP], (0.25,), (1,))
    tuned = product(["looser"], options.models, [DESKTOP], (0.25,), (1, 4))
    for place in (Place(*values) for values in (*desktop, *others, *tuned)):
        if place.machine in options.machines:
            yield place


@cache
def text(routing: str, model: str, work: Work) -> tuple[tuple[Recording, ...], tuple[Key, ...]]:
    """Return four sequences of a model, and its experts by popularity in other text."""
    shape = ModelShape.load(model)
    made = SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k, ROUTINGS[routing])
    rows = [made.sequence(i, work.prompt + work.new) for i in range(4)]
    recordings = tuple(Recording(str(i), work.prompt, r, ahead=guesses(r, seed=i)) for i, r in enumerate(rows))
    return recordings, by_popularity(made.profile().tolist())


def measure(place: Place, system: str, work: Work) -> Cell:
    """Simulate one cell."""
    shape, where = ModelShape.load(place.model).stored_as(FLOATS), Machine.load(place.machine)
    recordings, popular = text(place.routing, place.model, work)
    slots = n_slots(shape, where, share=place.resident)
    setting = Setting(shape=shape, machine=where, n_slots=slots, system=SYSTEMS[system], popular=popular)
    report = simulate(setting, recordings[: place.n_sequences])
    n_loads = report.n_hits + report.n_cpu + report.n_fetches
    return Cell(
        place=place,
        system=system,
        tokens_per_s=report.tokens_per_s,
        of_bound=report.of_bound,
        of_chain=report.of_chain,
        first_token_s=report.first_token_s,
        hits=report.n_hits / n_loads,
        on_cpu=report.n_cpu / n_loads,
        fetched=report.n_fetches / n_loads,
        n_ahead=report.prefetch.n_issued,
        n_ahead_used=report.prefetch.n_used,
        n_ahead_landed=report.prefetch.n_landed,
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Ours beside the others in one place."""

    place: Place
    over_original: float
    """How many times faster than `fiddler-2024`."""
    best_peer: str
    over_best: float
    of_bound: float
    of_chain: float


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """Return ours beside the others in every place where both were run."""
    found = []
    for place, group in groupby(cells, key=lambda cell: cell.place):
        by_system = {cell.system: cell for cell in group}
        peers = [cell for name, cell in by_system.items() if name != OURS]
        if OURS in by_system and ORIGINAL in by_system:
            ours, best = by_system[OURS], max(peers, key=lambda cell: cell.tokens_per_s)
            found.append(
                Verdict(
                    place=place,
                    over_original=ours.tokens_per_s / by_system[ORIGINAL].tokens_per_s,
                    best_peer=best.system,
                    over_best=ours.tokens_per_s / best.tokens_per_s,
                    of_bound=ours.of_bound,
                    of_chain=ours.of_chain,
                )
            )
    return found


def render(cells: Sequence[Cell], systems: Sequence[str]) -> str:
    """Return tokens per second by place and system, with ours beside the best of the others."""
    judged = {verdict.place: verdict for verdict in verdicts(cells)}
    speeds = {(cell.place, cell.system): cell.tokens_per_s for cell in cells}
    rows = []
    for place in dict.fromkeys(cell.place for cell in cells):
        name = f"{place.routing} {place.model} {place.machine} {place.resident:.3g} x{place.n_sequences}"
        verdict = judged.get(place)
        tail = [f"{verdict.over_original:.2f}", f"{verdict.over_best:.2f}"] if verdict else ["", ""]
        bounds = [f"{verdict.of_bound:.2f}", f"{verdict.of_chain:.2f}"] if verdict else ["", ""]
        rows.append([name, *(f"{speeds[place, system]:.2f}" for system in systems), *tail, *bounds])
    header = ["tokens/s, virtual", *systems, "x original", "x best", "of bound", "of chain"]
    return table("Systems side by side, simulated", header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("policies", __doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="NAME")
    parser.add_argument("--machines", nargs="+", default=MACHINES, choices=MACHINES, metavar="NAME")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens each sequence makes")
    parser.add_argument("--processes", type=int, default=2, help="side by side; 0: this one")
    options = parser.parse_args(arguments)
    work = Work(options.prompt, options.new)
    jobs = [(place, system, work) for place in places(options) for system in options.systems]
    cells = side_by_side(measure, jobs, options.processes)
    found = verdicts(cells)
    report = result("policies", machine.describe(), virtual=True, work=work, verdicts=found, cells=cells)
    shown = [render(cells, options.systems)]
    if found:
        mean = geometric_mean(v.over_best for v in found)
        shown.append(f"\nOurs over the best other: least {min(v.over_best for v in found):.3f}, mean {mean:.3f}")
    finish(options, report, *shown)


if __name__ == "__main__":
    main()
