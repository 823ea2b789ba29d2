"""What deciding costs: the scheduler, the runner and the lanes beside a bare hop to two lanes, and on a plain CPU.

    python -m bench.overhead [--layers 48] [--steps 60] [--model DIR] [--threads 1] [--json FILE]
    python -m bench.overhead --policy aged-lfu --prefetch off

Five figures, each a median:

- one layer of a step through runner, scheduler and three lane threads whose jobs do nothing, with the engine's own
  policy and prefetch unless others are named;
- the same through the lanes, crossing and jobs of a GPU that does nothing: no CUDA call is made; and again beside
  host experts of a millisecond, which hide what is worked out once they have begun;
- beside them, a bare hop: two jobs handed to the same lane threads and both reports awaited, nothing decided;
- a decoding step of a model (the demo model unless given) on the CPU through all of it, against the same step with
  each layer's experts computed by a plain call, in turns within one run.
"""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench import machine
from bench.overhead_gpu import gpu_layer_us
from bench.overhead_script import hop_us, layer
from bench.report import Spread, command, finish, result, table
from fiddler import DEMO
from fiddler.calibration.kernels import choose_kernels, compute_lane
from fiddler.config import EngineConfig
from fiddler.engine.assembly import Rig, assemble_rig
from fiddler.lab.policies import POLICIES
from fiddler.lab.systems import PREFETCH, System
from fiddler.lanes.experts import ComputeLane
from fiddler.models import dense
from fiddler.models.kv import SequenceKV
from fiddler.models.loaded import load
from fiddler.scheduler.waves import RowSpan

DECIDED = {
    "hits": "hits",
    "on_cpu": "on the CPU",
    "fetched": "copied in first",
    "promoted": "promoted",
    "ahead": "copied ahead",
    "jobs": "jobs",
}
"""What a layer came to, and how it is called."""
WARM_UP = 8
"""Steps that are not counted."""
EXPERTS_S = 1e-3
"""Seconds of a layer's experts on the host, of those that a GPU's host work is hidden behind."""


@dataclass(slots=True, eq=False)
class Decoding:
    """A sequence of made-up tokens, others for another `step`: all that a step needs of a request."""

    step: int
    past: SequenceKV = field(default_factory=SequenceKV)
    n_past: int = 0
    n_prompt: int = 0

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the tokens; two sequences visit other experts, or the second would find them in a cache."""
        return [100 + self.step * i % 3001 for i in range(start, stop)]

    def span(self) -> Any:
        """Return the next token as a span."""
        self.n_past += 1
        return RowSpan(self, self.n_past - 1, self.n_past, last=True)


def model_step_us(model: Path, n_steps: int) -> dict[str, Spread]:
    """Return the microseconds of a step of a model with the machinery and without."""
    config = EngineConfig(device="cpu")
    loaded = load(model, config)
    kernels = choose_kernels(loaded, config)
    dense.accelerate(loaded.model, kernels)
    rig, lane = assemble_rig(loaded, kernels, config), compute_lane(loaded, kernels)
    managed, plain = Decoding(37), Decoding(53)
    times: dict[str, list[float]] = {"scheduler": [], "plain call": []}
    for i in range(n_steps):
        turns = [("scheduler", partial(_managed, rig, managed)), ("plain call", partial(_plain, rig, lane, plain))]
        for name, step in turns if i % 2 else reversed(turns):
            started = perf_counter()
            step()
            times[name].append(1e6 * (perf_counter() - started))
    rig.close()
    return {name: Spread.of(taken[WARM_UP:]) for name, taken in times.items()}


def _managed(rig: Rig, sequence: Decoding) -> None:
    rig.steps.run([sequence.span()])


def _plain(rig: Rig, lane: ComputeLane, sequence: Decoding) -> None:
    forward = rig.steps._packed_forward([sequence.span()])
    call = forward.send()
    while not forward.dead:
        call = forward.send(lane.run(*call))
    list(call)  # the logits' rows, as a step returns them


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the report."""
    placed = System(policy=options.policy, prefetch=options.prefetch)
    gc.disable()
    with torch.inference_mode():
        hop = hop_us(options.layers * options.steps)
        gpu = gpu_layer_us(placed, options.layers, options.steps)
        beside = gpu_layer_us(placed, options.layers, options.steps, experts_s=EXPERTS_S)
        one = layer(placed, options.layers, options.steps)
        steps = model_step_us(options.model, options.steps)
    gc.enable()
    return result(
        "overhead",
        machine.describe(),
        virtual=False,
        system={"policy": placed.policy, "prefetch": placed.prefetch, "promote": placed.promote},
        layer_us=one.us,
        layer={name: getattr(one, name) for name in DECIDED},
        gpu_layer_us=gpu,
        gpu_layer_beside_us=beside,
        hop_us=hop,
        model=options.model.name,
        step_us=steps,
        cost=steps["scheduler"].median / steps["plain call"].median - 1.0,
    )


def render(report: dict[str, Any]) -> str:
    """Return the report as text."""
    decided = ", ".join(f"{report['layer'][name]:.2f} {said}" for name, said in DECIDED.items())
    by = f"{report['system']['policy']}, prefetch {report['system']['prefetch']}"
    rows = [
        (f"a layer by {by}: runner, scheduler, three lanes", f"{report['layer_us']:.0f}"),
        ("a layer on a GPU that does nothing: its lanes, crossing and jobs", f"{report['gpu_layer_us']:.0f}"),
        ("the same, beyond host experts of a millisecond", f"{report['gpu_layer_beside_us']:.0f}"),
        ("a bare hop to two lanes and back", f"{report['hop_us']:.0f}"),
        *((f"a step of {report['model']}, {name}", f"{taken:.0f}") for name, taken in report["step_us"].items()),
    ]
    shown = table("What deciding costs: median (least to most)", ("", "us"), rows)
    cost = f"On the plain CPU the machinery costs {100 * report['cost']:.1f} % of a step."
    return f"{shown}\n\nIn a layer: {decided}.\n{cost}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("overhead", __doc__ or "")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--policy", choices=POLICIES, default=System().policy)
    parser.add_argument("--prefetch", choices=PREFETCH, default=System().prefetch)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the demo model's experts are tiny")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = measure(options)
    finish(options, report, render(report))


if __name__ == "__main__":
    main()
