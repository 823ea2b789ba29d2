"""What an expert and a copy take on this machine, alone and side by side: the numbers a cost model is made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from threading import Event, Thread
from time import perf_counter

import torch
from torch import Tensor

from fiddler.cost.curve import Curve
from fiddler.cost.model import Contention, ExpertCosts
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.sim import SimDevice
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

FITTED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Row counts the curves go through."""
HELD_OUT = (3, 12, 48, 192)
"""Row counts that say how far the curves are off between them."""
BUDGET_S = 0.06
"""For one row count; at least two runs."""
BESIDE_S = 0.3
"""For CPU and link side by side."""

Weights = Callable[[], ExpertWeights]


@dataclass(frozen=True, slots=True)
class Measured:
    """One expert shape's costs and the residuals of its curves."""

    costs: ExpertCosts
    contention: Contention
    residuals: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Bench:
    """Measures with the engine's own devices, in the calling thread; walks over experts, so caches do not help."""

    host: CpuDevice
    n_experts: tuple[int, ...]
    accelerator: SimDevice | None = None

    @property
    def device_name(self) -> str:
        """What the costs belong to."""
        return "cpu" if self.accelerator is None else f"sim {self.accelerator.link_bytes_per_s}"

    def measure(self, layers: Sequence[int]) -> Measured:
        """Measure the experts of layers that share a shape."""
        with torch.inference_mode():
            on_host = cycle([(layer, expert) for expert in range(self.n_experts[layers[0]]) for layer in layers])
            layer = layers[0]
            nbytes = self.host.weights(layer, 0).nbytes
            cpu, cpu_off = self._curve(layer, lambda: self.host.weights(*next(on_host)))
            if self.accelerator is None:
                return Measured(ExpertCosts(cpu, cpu, 0.0, nbytes), Contention(), (("cpu", cpu_off),))
            gpu, gpu_off = self._curve(layer, self._from_slots(layer))
            copy_s = median(self._copies(layer, BESIDE_S))
            costs = ExpertCosts(cpu, gpu, copy_s, nbytes)
            return Measured(costs, self._contention(layer, costs), (("cpu", cpu_off), ("gpu", gpu_off)))

    def _curve(self, layer: int, weights: Weights) -> tuple[Curve, float]:
        """Return a curve through the fitted row counts, and its residual at the others."""
        times = {n: self._expert_s(layer, n, weights) for n in sorted((*FITTED, *HELD_OUT))}
        rising: list[tuple[float, float]] = []
        for n in FITTED:  # more rows never take less: a dip is noise
            rising.append((float(n), max(times[n], rising[-1][1] if rising else 0.0)))
        curve = Curve(tuple(rising))
        return curve, curve.residual([(float(n), times[n]) for n in HELD_OUT])

    def _expert_s(self, layer: int, n_rows: int, weights: Weights) -> float:
        rows = self._rows(layer, n_rows)
        load = Load(0, 0, n_rows)
        self.host.expert(layer, load, weights(), rows)
        taken: list[float] = []
        while len(taken) < 2 or (sum(taken) < BUDGET_S and len(taken) < 200):
            experts = weights()
            started = perf_counter()
            self.host.expert(layer, load, experts, rows)
            taken.append(perf_counter() - started)
        return median(taken)

    def _rows(self, layer: int, n_rows: int) -> Tensor:
        sample = self.host.weights(layer, 0).up[0]
        return torch.randn(n_rows, sample.shape[1]).to(sample.dtype)

    def _from_slots(self, layer: int) -> Weights:
        assert self.accelerator is not None
        slots = self.accelerator.arena.n_slots
        filled = min(slots, self.n_experts[layer])
        for slot in range(filled):
            self.accelerator.arena.write(slot, self.accelerator.block(layer, slot))
        order = cycle(range(filled))
        accelerator = self.accelerator
        return lambda: accelerator.weights(layer, next(order))

    def _copies(self, layer: int, budget_s: float) -> Iterator[float]:
        """Copy experts into slots for a while; yields each copy's seconds."""
        assert self.accelerator is not None
        deadline = perf_counter() + budget_s
        for expert in cycle(range(self.n_experts[layer])):
            started = perf_counter()
            self.accelerator.copy(layer, expert, expert % self.accelerator.arena.n_slots)
            yield perf_counter() - started
            if perf_counter() > deadline:
                return

    def _contention(self, layer: int, costs: ExpertCosts) -> Contention:
        """Run copies in a second thread beside experts in this one; returns what both lose."""
        stop, copies = Event(), list[float]()

        def copying() -> None:
            while not stop.is_set():
                copies.extend(self._copies(layer, 0.0))

        thread = Thread(target=copying)
        thread.start()
        beside = self._expert_s(layer, 1, lambda: self.host.weights(layer, 0))
        deadline = perf_counter() + BESIDE_S / 2
        order = cycle(range(self.n_experts[layer]))
        times = [beside]
        while perf_counter() < deadline:
            times.append(self._expert_s(layer, 1, lambda: self.host.weights(layer, next(order))))
        stop.set()
        thread.join()
        cpu = max(1.0, median(times) / costs.cpu(1))
        link = max(1.0, median(copies) / costs.copy_s) if copies and costs.copy_s > 0 else 1.0
        return Contention(cpu, link)
