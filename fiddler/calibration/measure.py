"""Measures an expert and a copy on this machine, alone and side by side: the numbers of a cost model.

Experts of a decoding step come from memory, not from a cache: measurements walk over a sample of experts that
together exceed the caches. Row counts are measured in rounds, so that a busy moment of the machine does not hit one
of them alone, and the fastest tenth of all runs counts, since noise only adds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from threading import Event, Thread
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from fiddler.calibration.kernels import set_own_threads
from fiddler.cost.model import Contention, CostModel, Curve, ExpertCosts
from fiddler.devices.arena import SimDevice
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

FITTED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Row counts that the curves go through."""
HELD_OUT = (3, 12, 48, 192)
"""Row counts that tell the curves' error between them."""
SAMPLE_BYTES = 768 << 20
"""Bytes of a sample's experts together, if there are enough: more than the caches of large servers."""
CURVE_S = 0.3
"""Seconds of rounds over the row counts; each count is run at least `LEAST` times."""
LEAST = 10
LONG_S = 0.05
"""A run that takes longer than this is made only twice."""
TOO_LONG_S = 6.0
"""A curve whose first round takes longer than this ends there; beyond, time grows as it did last."""
BESIDE_S = 0.15
"""Seconds of measuring for the CPU alone, the link alone, and both side by side, each."""

_MOST = 1000
"""Most rounds."""

Points = tuple[tuple[float, float], ...]
"""(rows, seconds)."""
CopyLoop = Callable[[float | None], Iterator[float]]
"""CopyLoop experts into slots for some seconds, or for ever; yields the seconds of each copy, at least two."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One expert shape's costs, and the times measured at row counts that its curves do not go through."""

    costs: ExpertCosts
    contention: Contention
    cpu_held_out: Points
    gpu_held_out: Points
    """Empty without an accelerator."""


class Measures(Protocol):
    """The interface of measuring a model with the engine's own devices."""

    @property
    def host(self) -> CpuDevice:
        """The CPU device."""
        ...

    @property
    def device_name(self) -> str:
        """Key of the costs, beside the CPU and the experts."""
        ...

    def way(self, layer: int) -> str:
        """Return a key for how a layer's experts reach the device; empty where there is only one way."""
        ...

    def measure(self, layers: Sequence[int]) -> Measured:
        """Measure the experts of layers that share a shape and a way."""
        ...

    def completed(self, costs: CostModel) -> CostModel:
        """Return the costs of a model's experts completed by the device's other costs."""
        ...


@dataclass(frozen=True, slots=True)
class Bench:
    """Measures the CPU, and a simulated accelerator if there is one, in the calling thread."""

    host: CpuDevice
    n_experts: tuple[int, ...]
    accelerator: SimDevice | None = None
    dtype: torch.dtype = torch.bfloat16
    """Dtype of rows that visit packed experts; others are visited in their own."""

    @property
    def device_name(self) -> str:
        """Key of the costs."""
        return "cpu" if self.accelerator is None else f"sim {self.accelerator.link_bytes_per_s}"

    def way(self, layer: int) -> str:
        """Return nothing: experts of one shape are alike."""
        return ""

    def completed(self, costs: CostModel) -> CostModel:
        """Return the costs as they are: the dense part is on the CPU, where its rows are."""
        return costs

    def measure(self, layers: Sequence[int]) -> Measured:
        """Measure the experts of layers that share a shape."""
        with torch.inference_mode():
            sample = self.sample(layers)
            nbytes = self.host.weights(*sample[0]).nbytes
            on_host = [self.host.weights(*key) for key in sample]
            cpu, cpu_held_out = self.curve(layers[0], on_host)
            if self.accelerator is None:
                return Measured(ExpertCosts(cpu, cpu, 0.0, nbytes), Contention(), cpu_held_out, ())
            gpu, gpu_held_out = self.curve(layers[0], _filled(self.accelerator, sample))
            copies = partial(_copies, self.accelerator, sample)
            copy_s = typical(list(copies(BESIDE_S)))
            contention = self.contention(layers[0], on_host, copies, copy_s)
            return Measured(ExpertCosts(cpu, gpu, copy_s, nbytes), contention, cpu_held_out, gpu_held_out)

    def sample(self, layers: Sequence[int]) -> list[tuple[int, int]]:
        """Choose experts, starting with the first of every layer, and bring them into memory."""
        keys = [(layer, expert) for expert in range(self.n_experts[layers[0]]) for layer in layers]
        n = max(2, SAMPLE_BYTES // self.host.weights(*keys[0]).nbytes + 1)
        rows = self._rows(layers[0], 1)
        for key in keys[:n]:
            self._run(key[0], 1, self.host.weights(*key), rows)
        return keys[:n]

    def curve(self, layer: int, sample: Sequence[ExpertWeights]) -> tuple[Curve, Points]:
        """Return the CPU's seconds by rows of an expert: a curve, and the times it was not fitted to."""
        experts, rows = cycle(sample), self._rows(layer, max(FITTED))
        return curve_of(lambda n: self._run(layer, n, next(experts), rows))

    def contention(
        self, layer: int, sample: Sequence[ExpertWeights], copies: CopyLoop, copy_s: float
    ) -> Contention:
        """Run one-row experts here, alone and beside copies in a second thread; returns how much both are slowed.

        `copy_s` is the time of a copy alone.
        """
        rows = self._rows(layer, 1)

        def experts_s() -> float:
            deadline, taken = perf_counter() + BESIDE_S, list[float]()
            for weights in cycle(sample):
                taken.append(self._run(layer, 1, weights, rows))
                if perf_counter() > deadline and len(taken) > 2:
                    break
            return typical(taken)

        alone_s = experts_s()
        with _beside(copies) as copied:
            beside_s = experts_s()
            n_copied = len(copied)  # what ends later may have run alone
        within = copied[:n_copied] or copied
        return Contention(max(1.0, beside_s / alone_s), max(1.0, typical(within) / copy_s))

    def _run(self, layer: int, n_rows: int, weights: ExpertWeights, rows: Tensor) -> float:
        """Run an expert on the first of `rows`; returns its seconds.

        One expert at a time: our own kernels run several at once in less than their sum.
        """
        out = empty_results(rows[:n_rows])
        started = perf_counter()
        self.host.run(layer, (Load(0, 0, n_rows),), (weights,), rows, out)
        return perf_counter() - started

    def _rows(self, layer: int, n_rows: int) -> Tensor:
        sample = self.host.weights(layer, 0).up[0]
        numbers = torch.Generator().manual_seed(0)  # nobody else's random numbers are used up
        dtype = sample.dtype if isinstance(sample, Tensor) else self.dtype
        return torch.randn(n_rows, sample.shape[1], generator=numbers, dtype=torch.float32).to(dtype)


def curve_of(run: Callable[[int], float]) -> tuple[Curve, Points]:
    """Return a curve through the fitted row counts, and the times of the others; `run` gives the seconds of one."""
    began = perf_counter()
    taken: dict[int, list[float]] = {}
    for n in sorted((*FITTED, *HELD_OUT)):
        if not taken or perf_counter() - began < TOO_LONG_S:
            taken[n] = [run(n)]
    for n_runs in range(2, _MOST):
        spent = perf_counter() - began > CURVE_S
        due = [n for n, runs in taken.items() if not spent or n_runs <= (2 if max(runs) > LONG_S else LEAST)]
        for n in due:
            taken[n].append(run(n))
        if not due:
            break
    points = [(float(n), typical(runs)) for n, runs in taken.items()]
    held_out = tuple((n, seconds) for n, seconds in points if n in HELD_OUT)
    return Curve(rising([(n, seconds) for n, seconds in points if n in FITTED])), held_out


@contextmanager
def _beside(copies: CopyLoop) -> Iterator[list[float]]:
    """Copy in another thread while the context lasts; gives the seconds of the copies that are done."""
    stop, begun, taken, n_threads = Event(), Event(), list[float](), torch.get_num_threads()

    def work() -> None:
        set_own_threads(n_threads)
        try:
            for seconds in copies(None):
                taken.append(seconds)
                begun.set()
                if stop.is_set():
                    return
        finally:
            begun.set()  # also where a copy failed: nobody waits for ever

    thread = Thread(target=work, name="fiddler-measure")
    thread.start()
    try:
        begun.wait()
        yield taken
    finally:
        stop.set()
        thread.join()


def _filled(accelerator: SimDevice, sample: Sequence[tuple[int, int]]) -> list[ExpertWeights]:
    """Fill slots with experts; returns them as they lie there."""
    layer = sample[0][0]
    slots = list(zip(range(accelerator.arena.n_slots), sample, strict=False))
    for slot, key in slots:
        accelerator.arena.write(slot, accelerator.block(*key))
    return accelerator.weights(layer, [slot for slot, _ in slots])


def _copies(accelerator: SimDevice, sample: Sequence[tuple[int, int]], budget_s: float | None) -> Iterator[float]:
    """Copy experts into slots, for a while or for ever; yields each copy's seconds, at least two."""
    deadline = None if budget_s is None else perf_counter() + budget_s
    slots = cycle(range(accelerator.arena.n_slots))
    for n, (layer, expert) in enumerate(cycle(sample), 1):
        started = perf_counter()
        accelerator.copy(layer, expert, next(slots))
        yield perf_counter() - started
        if deadline is not None and perf_counter() > deadline and n > 1:
            return


def typical(seconds: Sequence[float]) -> float:
    """Return the slowest of the fastest tenth: the time when nothing disturbs; the fastest if runs are few."""
    return sorted(seconds)[len(seconds) // 10]


def rising(points: Sequence[tuple[float, float]]) -> Points:
    """Return the nearest points, by least squares, whose seconds never fall: more rows take no less, a dip is
    noise.

    Neighbours that fall are replaced by their mean until none do (pool adjacent violators: Ayer et al., 1955).
    """
    pools: list[tuple[float, int]] = []
    for _, seconds in points:
        pools.append((seconds, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, n_b), (a, n_a) = pools.pop(), pools.pop()
            pools.append(((a * n_a + b * n_b) / (n_a + n_b), n_a + n_b))
    level = iter([mean for mean, n in pools for _ in range(n)])
    return tuple((rows, next(level)) for rows, _ in points)
