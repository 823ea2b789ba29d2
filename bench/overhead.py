"""What deciding costs: the scheduler, the runner and the lanes beside a bare hop to two lanes, and on a plain CPU.

    python -m bench.overhead [--layers 48] [--steps 60] [--model DIR] [--threads 1] [--json FILE]

Three figures, each a median:

- one layer of a step through runner, scheduler and three lane threads whose jobs do nothing;
- beside it, a bare hop: two jobs handed to the same lane threads and both reports awaited, nothing decided;
- a decoding step of a model (the demo model unless given) on the CPU through all of it, against the same step with
  each layer's experts computed by a plain call, in turns within one run.
"""

import argparse
import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import torch

from bench import machine
from bench.report import Spread, heading, table, write_json
from fiddler import DEMO
from fiddler.cache.recorded import Recording, guesses
from fiddler.cache.synthetic import SyntheticRouting
from fiddler.config import EngineConfig
from fiddler.cost.curve import Curve
from fiddler.cost.model import CostModel, ExpertCosts
from fiddler.devices.kernels import Kernels
from fiddler.engine.assemble import Span
from fiddler.engine.rig import Rig, assemble_rig
from fiddler.engine.runner import Runner
from fiddler.engine.script import Script, ScriptWave
from fiddler.engine.setup import compute_lane
from fiddler.lanes.threads import ThreadLanes
from fiddler.models.kv import SequenceKV
from fiddler.models.loaded import ServableModel, load
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.messages import CopyExpert, Job, RunExperts
from fiddler.scheduler.systems import System, cache_of, prefetch_of

N_EXPERTS, TOP_K, SHARE = 128, 8, 0.5
"""Of the scripted model: Qwen3-30B-A3B's, half of its experts resident."""
WARM_UP = 8
"""Steps that are not counted."""


def nothing(_job: Job) -> dict[int, Exception]:
    """Do a job at no cost."""
    return {}


async def layer_us(n_layers: int, n_steps: int) -> Spread:
    """Return the microseconds of a scripted layer, step by step."""
    n_experts = (N_EXPERTS,) * n_layers
    free = Curve(((1.0, 1e-9),))
    costs = CostModel(experts=(ExpertCosts(free, free, 1e-9, 1),) * n_layers)
    cache = cache_of(System(), int(SHARE * N_EXPERTS * n_layers), n_experts, TOP_K)
    lanes = ThreadLanes(nothing)
    runner = Runner(Scheduler(cache, costs, ahead=prefetch_of("auto", cache)), lanes)
    routing = SyntheticRouting(n_layers, N_EXPERTS, TOP_K).sequence(0, n_steps)
    script = Script(Recording("overhead", 0, routing, ahead=guesses(routing)))
    times = []
    for token in range(n_steps):
        wave = ScriptWave([Span(script, token, token + 1, last=True)], n_experts)
        started = perf_counter()
        await runner.run([wave])
        times.append(1e6 * (perf_counter() - started) / n_layers)
    await runner.settle()
    await lanes.aclose()
    return Spread.of(times[WARM_UP:])


async def hop_us(n_hops: int) -> Spread:
    """Return the microseconds from handing a job each to two lanes to having both reports."""
    lanes = ThreadLanes(nothing)
    times = []
    for i in range(n_hops):
        started = perf_counter()
        lanes.start(RunExperts(2 * i, "cpu", 0, 0, (), (), 0.0))
        lanes.start(CopyExpert(2 * i + 1, 0, 0, 0, True, 0.0))
        for _ in range(2):
            await lanes.report()
        times.append(1e6 * (perf_counter() - started))
    await lanes.aclose()
    return Spread.of(times[WARM_UP:])


@dataclass(slots=True, eq=False)
class Decoding:
    """A sequence of made-up tokens, others for another `step`: all that a step needs of a request."""

    step: int
    past: SequenceKV = field(default_factory=SequenceKV)
    n_past: int = 0

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the tokens; two sequences visit other experts, or the second would find them in a cache."""
        return [100 + self.step * i % 3001 for i in range(start, stop)]

    def span(self) -> Any:
        """Return the next token as a span."""
        self.n_past += 1
        return Span(self, self.n_past - 1, self.n_past, last=True)


async def model_step_us(model: Path, n_steps: int) -> dict[str, Spread]:
    """Return the microseconds of a step of a model with the machinery and without."""
    config = EngineConfig(kernels="linear")
    loaded = load(model, config)
    rig = assemble_rig(loaded, Kernels(), config)
    managed, plain = Decoding(37), Decoding(53)
    times: dict[str, list[float]] = {"scheduler": [], "plain call": []}
    for i in range(n_steps):
        turns = [("scheduler", lambda: _managed(rig, managed)), ("plain call", lambda: _plain(rig, loaded, plain))]
        for name, step in turns if i % 2 else reversed(turns):
            started = perf_counter()
            await step()
            times[name].append(1e6 * (perf_counter() - started))
    await rig.aclose()
    return {name: Spread.of(taken[WARM_UP:]) for name, taken in times.items()}


async def _managed(rig: Rig, sequence: Decoding) -> None:
    await rig.steps.run([sequence.span()])


async def _plain(rig: Rig, loaded: ServableModel, sequence: Decoding) -> None:
    lane = compute_lane(loaded, Kernels())
    forward = rig.steps._packed_forward([sequence.span()])
    result = forward.send()
    while not forward.dead:
        result = forward.send(lane.run(*result))
    list(result)  # the logits' rows, as a step returns them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the demo model's experts are tiny")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine.describe()
    gc.disable()
    with torch.inference_mode():
        hop = _run(lambda: hop_us(options.layers * options.steps))
        layer = _run(lambda: layer_us(options.layers, options.steps))
        steps = _run(lambda: model_step_us(options.model, options.steps))
    cost = steps["scheduler"].median / steps["plain call"].median - 1.0
    rows = [
        ("a layer: runner, scheduler, three lanes", f"{layer:.0f}"),
        ("a bare hop to two lanes and back", f"{hop:.0f}"),
        *((f"a step of {options.model.name}, {name}", f"{taken:.0f}") for name, taken in steps.items()),
    ]
    print(heading(where))
    print(table("What deciding costs: median (least to most)", ("", "us"), rows))
    print(f"\nOn the plain CPU the machinery costs {100 * cost:.1f} % of a step.")
    if options.json is not None:
        write_json(
            options.json,
            {
                "machine": where,
                "layer_us": layer,
                "hop_us": hop,
                "model": options.model.name,
                "step_us": steps,
                "cost": cost,
            },
        )


def _run(work: Callable[[], Any]) -> Any:
    return anyio.run(work, backend_options={"use_uvloop": importlib.util.find_spec("uvloop") is not None})


if __name__ == "__main__":
    main()
