"""Expert compute of one layer, start to end, on the CPU."""

import time
from dataclasses import dataclass

from torch import Tensor

from fiddler.devices.cpu import CpuDevice
from fiddler.lanes.combine import combine, gather
from fiddler.scheduler.routing import route


@dataclass(slots=True)
class ComputeCounters:
    """What the lane has done; the lane is its only writer."""

    n_rows: int = 0
    n_loads: int = 0
    n_bytes: int = 0
    busy_s: float = 0.0


class ComputeLane:
    """Runs every expert of a layer on the CPU, in the caller's thread."""

    def __init__(self, device: CpuDevice, n_experts: tuple[int, ...]) -> None:
        self._device = device
        self._n_experts = n_experts
        self.counters = ComputeCounters()

    def run(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' output `[T, H]` for `hidden` `[T, H]`, routed by `index` and `weights` `[T, K]`."""
        work = route(layer, index.flatten().tolist(), self._n_experts[layer], weights.flatten().tolist())
        if not work.loads:
            return hidden.new_zeros(hidden.shape)
        rows = gather(hidden, work, index.shape[1])
        started = time.perf_counter()
        outputs = self._device.run(layer, work.loads, rows)
        self.counters.busy_s += time.perf_counter() - started
        self.counters.n_rows += len(work.order)
        self.counters.n_loads += len(work.loads)
        self.counters.n_bytes += sum(self._device.weights(layer, load.expert).nbytes for load in work.loads)
        return combine(outputs, work, weights)
