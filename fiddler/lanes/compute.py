"""A layer's experts at once, on the CPU, for a forward that nobody drives."""

from dataclasses import dataclass

from torch import Tensor

from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.lanes.combine import combine, gather
from fiddler.scheduler.routing import route


@dataclass(frozen=True, slots=True)
class ComputeLane:
    """Runs every expert of a layer in the caller's thread."""

    device: CpuDevice
    n_experts: tuple[int, ...]
    """By layer."""

    def run(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' output `[T, H]` for `hidden` `[T, H]`, routed by `index` and `weights` `[T, K]`."""
        work = route(layer, index.flatten().tolist(), self.n_experts[layer], weights.flatten().tolist())
        if not work.loads:
            return hidden.new_zeros(hidden.shape)
        rows = gather(hidden, work, index.shape[1])
        out = empty_results(rows)
        own = [self.device.weights(layer, load.expert) for load in work.loads]
        self.device.run(layer, work.loads, own, rows, out)
        return combine(out, work.order, weights)
