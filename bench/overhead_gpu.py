"""A layer on a GPU that does nothing, through its lanes, crossing and jobs: no CUDA call, all of it the host.

The host's experts take no time either, or, to see how much of the host's work hides behind them, a millisecond in
which their worker sleeps: `Machine.host_layer_s` is what a layer then takes beyond that sleep.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.overhead_script import MODEL, WARM_UP, scheduler_of
from bench.report import Spread
from fiddler.gpu.crossing import Watch
from fiddler.gpu.jobs import Copying, GpuJobs
from fiddler.gpu.streams import StreamLanes
from fiddler.lab.shape import ModelShape
from fiddler.lab.synthetic import SyntheticRouting
from fiddler.lab.systems import System
from fiddler.lanes.runner import Runner
from fiddler.models.seam import ExpertsCall
from fiddler.recording import guesses
from fiddler.steps.wave import Experts, ModelWave
from fiddler.types import ExpertWeights

T = TypeVar("T")


class _Idle:
    """A GPU, its streams, events, experts and slots: whatever it is given is done, and nothing was."""

    device = torch.device("cpu")
    weight = ExpertWeights((torch.zeros(1, 1),), torch.zeros(1, 1))

    def __init__(self) -> None:
        self.main = self.link = self.up = self
        self.down = _Copies()  # the host reads the routing, so it has to come

    def nothing(self, *_: Any) -> None:
        pass

    run = follow = wait = copy = write = nothing

    def mark(self) -> Any:
        return self

    def done(self) -> bool:
        return True

    def since(self, _: Any) -> float:
        return 1e-6

    def launch(self, work: Callable[[], T]) -> T:
        return work()  # what a GPU would queue: few, small operations

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def weights(self, *_: int) -> ExpertWeights:
        return self.weight

    def experts(self, _: int, loads: Any) -> list[ExpertWeights]:
        return [self.weight] * len(loads)


class _Host(_Idle):
    """The host's kernels, which sleep for so long."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.slept_s = 0.0

    def run(self, *_: Any) -> None:
        if self.seconds:
            started = perf_counter()
            sleep(self.seconds)
            self.slept_s += perf_counter() - started


class _Copies(_Idle):
    def __init__(self) -> None:
        self.main = self

    def run(self, *work: Any) -> None:
        work[0]()


@dataclass
class _Routed:
    """A forward that asks for experts, as a routing `[L, K]` says, and computes nothing."""

    routing: Tensor
    hidden: Tensor
    dead = False

    def send(self, _: Tensor | None) -> Any:
        if not len(self.routing):
            self.dead = True
            return self.hidden
        index, self.routing = self.routing[:1], self.routing[1:]
        self.layer = getattr(self, "layer", -1) + 1
        return ExpertsCall(self.layer, self.hidden, index, torch.ones(index.shape))

    def close(self) -> None:
        pass


def gpu_layer_us(system: System, n_layers: int, n_steps: int, *, experts_s: float = 0.0) -> Spread:
    """Return the microseconds of a layer of one sequence that decodes, experts half in slots.

    The host's experts of a layer take `experts_s`, which is not counted.
    """
    shape, idle, host = ModelShape.load(MODEL), _Idle(), _Host(experts_s)
    copying: Any = Copying(idle, lambda *_: idle.weight.down, lambda *_: True, idle)  # type: ignore[arg-type]
    jobs = GpuJobs(idle, Watch(), host, idle, copying)  # type: ignore[arg-type]
    lanes = StreamLanes(jobs)
    runner = Runner(scheduler_of(shape, system, n_layers), lanes)
    runner.preload()
    routing = SyntheticRouting(n_layers, shape.n_experts, shape.top_k).sequence(0, n_steps)
    ahead, times = guesses(routing), []
    for visits, expected in zip(torch.tensor(routing), torch.tensor(ahead), strict=True):
        asked = Experts(jobs.crossing, (shape.n_experts,) * n_layers, 0, _Ahead(expected))  # type: ignore[arg-type]
        forward: Any = _Routed(visits.long(), torch.zeros(1, shape.hidden, dtype=torch.bfloat16))
        wave = ModelWave([forward], asked, n_rows=1, n_context=1)
        started, host.slept_s = perf_counter(), 0.0
        runner.run([wave])
        times.append(1e6 * (perf_counter() - started - host.slept_s) / n_layers)
    runner.settle()
    lanes.close()
    return Spread.of(times[WARM_UP:])


@dataclass(frozen=True)
class _Ahead:
    expected: Tensor

    def expects(self, layer: int, _: Tensor) -> Tensor | None:
        return self.expected[layer + 1 : layer + 2].long() if layer + 1 < len(self.expected) else None
