"""How many more experts each cache policy reads than Belady's algorithm, which knows the future.

    python -m bench.cache [--tokens 128] [--sequences 4] [--half-life 32] [--processes 2] [--json FILE]

Routing is recorded (`bench/traces/demo.safetensors`, in two halves of different domains) and made up
(`fiddler.lab.synthetic`, the shapes that ship with Fiddler, with two sets of habits). Policies were tuned on the
traces called `tuning`; the others are held out. The sequences of a trace run one after the other through one cache.
"static-profile" is a fixed placement by popularity in other text: the other half, or other sequences of the same
made-up model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from bench import machine
from bench.policies import MODELS
from bench.report import command, finish, listing, result, side_by_side
from fiddler.config import EngineConfig
from fiddler.lab.policies import POLICIES, by_popularity, make_policy
from fiddler.lab.replay import MakePolicy, compare
from fiddler.lab.shape import ModelShape
from fiddler.lab.synthetic import PUBLISHED, Habits, SyntheticRouting
from fiddler.lab.traces import load
from fiddler.recording import Recording, RoutingTrace, visits

DEMO = Path(__file__).parent / "traces" / "demo.safetensors"
HALVES = ("demo, tuning", "demo, held out")
TUNED_ON = ("jargon", "python", "scripture")
"""Domains of the demo model's tuning half."""
HABITS = {"tuning": Habits(), "held out": PUBLISHED}
SHARES = (0.1, 0.2, 0.4)
PROFILED = "static-profile"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is replayed; every number is a policy's or a made-up routing's."""

    tokens: int
    """Of each made-up sequence."""
    sequences: int
    half_life: float
    chunk_tokens: int = 512


Cell = dict[str, Any]
"""One policy on one trace with one number of slots; its ratio is of misses over Belady's."""


def traces() -> list[str]:
    """Return the names of all traces there are."""
    return [*(HALVES if DEMO.is_file() else ()), *(f"{name}, {set_}" for name in MODELS for set_ in HABITS)]


def read(name: str, settings: Settings) -> tuple[RoutingTrace, Sequence[Recording]]:
    """Return a trace, and other text of the same model."""
    if name in HALVES:
        whole = load(DEMO)
        wanted = name == HALVES[0]
        own, other = (
            tuple(r for r in whole.recordings if (_domain(r) in TUNED_ON) is half) for half in (wanted, not wanted)
        )
        return RoutingTrace(whole.model, whole.n_experts, own), other
    model, _, habits = name.partition(", ")
    shape = ModelShape.load(model)
    routing = SyntheticRouting(shape.n_layers, shape.n_experts, shape.top_k, HABITS[habits])
    made = [Recording(f"made/{i}", 0, routing.sequence(i, settings.tokens)) for i in range(2 * settings.sequences)]
    own = tuple(made[: settings.sequences])
    return RoutingTrace(name, (shape.n_experts,) * shape.n_layers, own), made[settings.sequences :]


def _domain(recording: Recording) -> str:
    return recording.name.partition("/")[0]


def play(name: str, share: float, settings: Settings) -> list[Cell]:
    """Replay one trace with one number of slots under all policies."""
    trace, other = read(name, settings)
    n_slots = round(share * sum(trace.n_experts))
    played = list(visits(trace.recordings, settings.chunk_tokens))
    return [
        {
            "trace": name,
            "policy": score.policy,
            "resident": share,
            "n_slots": n_slots,
            "n_hits": score.replay.n_hits,
            "n_misses": score.replay.n_misses,
            "n_tokens": score.replay.n_tokens,
            "ratio": score.ratio,
        }
        for score in compare(played, _policies(trace, other, settings), [n_slots])
    ]


def _policies(trace: RoutingTrace, other: Sequence[Recording], settings: Settings) -> dict[str, MakePolicy]:
    top_k = trace.recordings[0].experts.shape[2]
    make = partial(make_policy, n_experts=trace.n_experts, half_life=settings.half_life, top_k=top_k)
    policies: dict[str, MakePolicy] = {name: partial(make, name) for name in POLICIES}
    policies[PROFILED] = partial(make, "static", order=by_popularity(_counts(other, trace.n_experts)))
    return policies


def _counts(recordings: Sequence[Recording], n_experts: Sequence[int]) -> list[list[int]]:
    """Return visits by layer and expert."""
    tokens = np.concatenate([recording.experts for recording in recordings])
    by_layer = [tokens[:, layer] for layer in range(len(n_experts))]
    return [np.bincount(rows[rows >= 0], minlength=n).tolist() for rows, n in zip(by_layer, n_experts, strict=True)]


def measure(names: Sequence[str], settings: Settings, n_processes: int) -> list[Cell]:
    """Replay everything, in this process where `n_processes` is 0."""
    jobs = [(name, share, settings) for name in names for share in SHARES]
    return [cell for cells in side_by_side(play, jobs, n_processes) for cell in cells]


def summaries(cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Yield each policy's ratios over each half of the recorded traces, over the made-up ones, and over all."""
    names = dict.fromkeys(cell["trace"] for cell in cells)
    sets = {set_: [name for name in names if name.endswith(set_) and name not in HALVES] for set_ in HABITS}
    groups = {name: [name] for name in names if name in HALVES}
    groups |= {f"made up, {set_}": members for set_, members in sets.items() if members} | {"all": [*names]}
    for policy in dict.fromkeys(cell["policy"] for cell in cells):
        for group, members in groups.items():
            ratios = [cell["ratio"] for cell in cells if cell["policy"] == policy and cell["trace"] in members]
            if ratios:
                spread = {"mean": mean(ratios), "median": median(ratios), "worst": max(ratios)}
                yield {"policy": policy, "traces": group, **spread}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("cache", __doc__)
    parser.add_argument("--tokens", type=int, default=128, help="of each made-up sequence (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="made up of each shape (default: %(default)s)")
    parser.add_argument("--half-life", type=float, default=EngineConfig().half_life)
    parser.add_argument("--traces", nargs="+", choices=traces(), default=traces(), metavar="NAME")
    parser.add_argument("--processes", type=int, default=2, help="side by side; 0: this one")
    options = parser.parse_args(arguments)
    settings = Settings(options.tokens, options.sequences, options.half_life)
    cells = measure(options.traces, settings, options.processes)
    found = sorted(summaries(cells), key=lambda summary: (summary["traces"], summary["mean"]))
    report = result("cache", machine.describe(), virtual=False, settings=settings, summary=found, cells=cells)
    finish(options, report, listing("Reads beside Belady's", found))


if __name__ == "__main__":
    main()
