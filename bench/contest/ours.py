"""Fiddler under the stopwatch: an engine whose steps are taken apart from inside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeVar, cast

import anyio
import torch
from torch import Tensor, nn

from bench.workload import Run, Step, Workload
from fiddler import Engine
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.lanes.experts import ExpertWork, gather
from fiddler.lanes.queues import Channel
from fiddler.models.loaded import ServableModel
from fiddler.models.seam import ExpertsCall, Forward
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
    """Wraps an idle engine's steps with clocks, and listens at its modules; adds a few microseconds to a layer.

    It reaches into private parts, which is what makes the numbers those of the real path: same thread, same caches.
    For an engine whose experts run on the CPU alone: what its lane has done by the end of a step is the step's.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine._loop is not None
        assert engine._loaded is not None
        assert engine._loaded.resolved.device == "cpu"
        self.loaded: ServableModel = engine._loaded
        self.steps: list[Step] = []
        """Every step since the list was last emptied."""
        loop: Any = engine._loop
        work: ExpertWork = loop._rig.side.work
        self.device: CpuDevice = work.host
        self._lane = work.counters["cpu"]
        loop._steps.run = self._forward(loop._steps.run)
        loop._step = self._step(loop._step)
        loop._apply = self._apply(loop._apply)
        assert engine._thread is not None
        self._inbox: Any = engine._thread.inbox
        self._suspend = Forward.suspend
        self._watch_head(self.loaded.model.get_output_embeddings())
        self._watch_experts()

    def close(self) -> None:
        """Stop watching forwards: those of other engines are none of ours."""
        Forward.suspend = self._suspend

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
            now = Step(n_rows=0)
            self.steps.append(now)
            before = self._lane.snapshot()
            started = perf_counter()
            inner()
            now.total_s = perf_counter() - started
            after = self._lane.snapshot()
            now.kernels_s = after.busy_s - before.busy_s
            now.expert_bytes = after.n_bytes - before.n_bytes
            now.n_loads = after.n_loads - before.n_loads

        return step

    def _forward(self, inner: Callable[[Any], T]) -> Callable[[Any], T]:
        def run(spans: Any) -> T:
            self.steps[-1].n_rows = sum(span.n_rows for span in spans)
            started = perf_counter()
            outcomes = inner(spans)
            self.steps[-1].forward_s = perf_counter() - started
            return outcomes

        return run

    def _watch_experts(self) -> None:
        """Time each layer's experts as its forward does: from where it is suspended to where it goes on.

        Every forward of the process is watched from now on. Not with hooks of the experts modules, which slow the
        demo model by a fifth.
        """
        suspend = self._suspend

        def watched(forward: Forward, call: ExpertsCall) -> Tensor:
            step = self.steps[-1]
            step.n_visits += call.index.numel()
            step.calls.append((call.layer, call.hidden.clone(), call.index.clone()))
            started = perf_counter()
            output = suspend(forward, call)
            step.experts_s += perf_counter() - started
            return output

        Forward.suspend = watched

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
    times: list[list[float]] = [[] for _ in tokens]
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
            times[number].append(token.made_s)
            tokens[number].append(token.id)

    async with anyio.create_task_group() as group:
        for number, prompt in enumerate(workload.prompts(seed)):
            group.start_soon(consume, number, prompt)
    first, last = max(made[0] for made in times), max(made[-1] for made in times)
    return Run(
        first_token_s=first - started,
        decode_s=last - first,
        n_sequences=workload.n_sequences,
        n_output=workload.n_output,
        tokens=tuple(tuple(made) for made in tokens),
    )


async def run_on_its_clock(engine: Engine, workload: Workload, seed: int) -> Run:
    """Run a workload on a machine in virtual time: its prompts to their first tokens, and then once more whole.

    Its clock goes on while a token is on its way to whoever reads it, so the two are told apart by two runs.
    """
    first = await _clocked(engine, replace(workload, n_output=1), seed)
    whole = await _clocked(engine, workload, seed)
    return Run(first, whole - first, workload.n_sequences, workload.n_output)


async def _clocked(engine: Engine, workload: Workload, seed: int) -> float:
    before = engine.statistics().step_s
    await run(engine, workload, seed)
    return engine.statistics().step_s - before


def alone(probe: Probe, steps: Sequence[Step]) -> list[float]:
    """Run the experts of steps again, their kernels and nothing else; returns each step's seconds."""
    with torch.inference_mode():
        return [sum(_kernels_alone(probe, *call) for call in step.calls) for step in steps]


def _kernels_alone(probe: Probe, layer: int, hidden: Tensor, index: Tensor) -> float:
    device, loaded = probe.device, probe.loaded
    work = route(layer, index.flatten().tolist(), loaded.n_experts[layer])
    rows = gather(hidden, work, index.shape[1])
    weights = [loaded.weights(layer, load.expert) for load in work.loads]
    out = empty_results(rows)
    started = perf_counter()
    device.run(layer, work.loads, weights, rows, out)
    return perf_counter() - started
