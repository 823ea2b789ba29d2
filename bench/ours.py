"""Fiddler under the stopwatch: an engine whose steps are taken apart from inside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar, cast

import anyio
import torch
from torch import Tensor, nn

from bench.workload import Run, Step, Workload
from fiddler import Engine
from fiddler.devices.mlp import run_expert
from fiddler.lanes.channel import Channel
from fiddler.lanes.combine import gather
from fiddler.lanes.compute import ComputeLane
from fiddler.models.loaded import ServableModel
from fiddler.scheduler.routing import route

SEED_STEP = 1000


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job:
    """Something to be done on the engine's thread, and where its outcome goes."""

    work: Callable[[], Any]
    outcome: Channel[Any]

    def run(self) -> None:
        try:
            with torch.inference_mode(False):
                self.outcome.push(self.work())
        except BaseException as error:
            self.outcome.push(error)


class Probe:
    """Wraps an idle engine's inner calls with clocks; adds a few microseconds to a layer.

    It reaches into private parts, which is what makes the numbers those of the real path: same thread, same caches.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine._loop is not None
        assert engine._loaded is not None
        self.loaded: ServableModel = engine._loaded
        self.lane: ComputeLane = engine._loop._lane
        self.steps: list[Step] = []
        """Every step since the list was last emptied."""
        loop: Any = engine._loop
        runner = loop._steps
        runner._compute = self._experts(runner._compute)
        runner.run = self._forward(runner.run)
        loop._step = self._step(loop._step)
        loop._apply = self._apply(loop._apply)
        self._inbox: Any = engine._inbox
        self._watch_head(self.loaded.model.get_output_embeddings())

    async def call(self, work: Callable[[], T]) -> T:
        """Do something on the engine's thread and return its outcome.

        Everything that is compared runs there: each Python thread that uses OpenMP gets a team of workers of its
        own, and libgomp lets workers wait actively only while all teams together fit on the cores.
        """
        outcome: Channel[Any] = Channel()
        self._inbox.push(_Job(work, outcome))
        value = await outcome.receive()
        if isinstance(value, BaseException):
            raise value
        return cast("T", value)

    def _apply(self, inner: Callable[[list[Any]], None]) -> Callable[[list[Any]], None]:
        def apply(commands: list[Any]) -> None:
            inner([command for command in commands if not isinstance(command, _Job)])
            for command in commands:
                if isinstance(command, _Job):
                    command.run()

        return apply

    def _step(self, inner: Callable[[], None]) -> Callable[[], None]:
        def step() -> None:
            self.steps.append(Step(n_rows=0))
            started = perf_counter()
            inner()
            self.steps[-1].total_s = perf_counter() - started

        return step

    def _forward(self, inner: Callable[[Any], list[Tensor]]) -> Callable[[Any], list[Tensor]]:
        def run(spans: Any) -> list[Tensor]:
            self.steps[-1].n_rows = sum(span.n_rows for span in spans)
            started = perf_counter()
            logits = inner(spans)
            self.steps[-1].forward_s = perf_counter() - started
            return logits

        return run

    def _experts(self, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        counters = self.lane.counters

        def compute(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            step = self.steps[-1]
            step.calls.append((layer, hidden.clone(), index.clone()))
            busy_s, n_bytes, n_loads = counters.busy_s, counters.n_bytes, counters.n_loads
            started = perf_counter()
            output = inner(layer, hidden, index, weights)
            step.experts_s += perf_counter() - started
            step.kernels_s += counters.busy_s - busy_s
            step.expert_bytes += counters.n_bytes - n_bytes
            step.n_loads += counters.n_loads - n_loads
            return output

        return compute

    def _watch_head(self, head: nn.Module) -> None:
        started = 0.0

        def before(*_: Any) -> None:
            nonlocal started
            started = perf_counter()

        def after(*_: Any) -> None:
            self.steps[-1].head_s = perf_counter() - started

        head.register_forward_pre_hook(before)
        head.register_forward_hook(after)


async def run(engine: Engine, workload: Workload, seed: int) -> Run:
    """Run a workload; sampled, so that a random model does not repeat one token and find its experts in a cache."""
    tokens: list[list[int]] = [[] for _ in range(workload.n_sequences)]
    firsts: list[float] = []
    started = perf_counter()

    async def consume(number: int, prompt: list[int]) -> None:
        options: dict[str, Any] = {
            "max_new_tokens": workload.n_output,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": None,
            "top_p": None,
            "eos_token_id": [],
            "seed": seed * SEED_STEP + number,
        }
        async for token in engine.generate_stream(prompt, **options):
            if not tokens[number]:
                firsts.append(perf_counter() - started)
            tokens[number].append(token.id)

    async with anyio.create_task_group() as group:
        for number, prompt in enumerate(workload.prompts(seed)):
            group.start_soon(consume, number, prompt)
    total_s = perf_counter() - started
    return Run(
        first_token_s=max(firsts),
        decode_s=total_s - max(firsts),
        n_sequences=workload.n_sequences,
        n_output=workload.n_output,
        tokens=tuple(tuple(made) for made in tokens),
    )


def alone(probe: Probe, steps: Sequence[Step]) -> list[float]:
    """Run the experts of steps again, their kernels and nothing else; returns each step's seconds."""
    with torch.inference_mode():
        return [sum(_kernels_alone(probe, *call) for call in step.calls) for step in steps]


def _kernels_alone(probe: Probe, layer: int, hidden: Tensor, index: Tensor) -> float:
    device, loaded = probe.lane._device, probe.loaded
    work = route(layer, index.flatten().tolist(), loaded.n_experts[layer])
    rows = gather(hidden, work, index.shape[1])
    jobs = []
    for load in work.loads:
        weights = loaded.weights(layer, load.expert)
        jobs.append((weights, rows[load.start : load.stop], *device.matmuls(layer, load.n_rows, weights)))
    formula = device.formulas[layer]
    started = perf_counter()
    for job in jobs:
        run_expert(formula, *job)
    return perf_counter() - started
