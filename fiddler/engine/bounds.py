"""What no schedule of the same reads can beat."""

from collections.abc import Mapping
from dataclasses import dataclass

from fiddler.cost.lanes import LaneName
from fiddler.cost.machine import Machine


@dataclass(frozen=True, slots=True)
class Bound:
    """What no schedule of the same bytes can beat: the longest of three reads, each at its full rate.

    `max(bytes_cpu / B_H, bytes_link / B_P, bytes_gpu / B_V)`; the dense part and the keys and values read count as
    the GPU's.
    """

    cpu_s: float
    link_s: float
    gpu_s: float

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.cpu_s, self.link_s, self.gpu_s)


class Chain:
    """Reads in the order in which layers need them: the dense part, then CPU and GPU side by side, then the next.

    What copies take is left out, for they may be made ahead. Where a step is two waves, one's dense part may hide
    behind the other's experts, and its longest read alone counts.
    """

    def __init__(self, machine: Machine, read_bytes: Mapping[LaneName, int]) -> None:
        self.seconds = 0.0
        """Of all steps so far: no schedule of the same waves takes less."""
        self._machine = machine
        self._read_bytes = read_bytes
        self._layers: list[tuple[float, float]] = []  # seconds of the CPU's reads and of the GPU's
        self._before = (0, 0)
        self.layer()
        self._layers.clear()

    def layer(self) -> None:
        """Take note that a layer's experts have run."""
        now, before = (self._read_bytes["cpu"], self._read_bytes["gpu"]), self._before
        rates = self._machine.cpu_read_bytes_per_s, self._machine.gpu_read_bytes_per_s
        self._layers.append(((now[0] - before[0]) / rates[0], (now[1] - before[1]) / rates[1]))
        self._before = now

    def step(self, n_waves: int, dense_bytes: int) -> None:
        """Take note that a step is over, in which the GPU read so much beside experts."""
        dense_s = dense_bytes / self._machine.gpu_read_bytes_per_s
        if n_waves == 1:
            self.seconds += dense_s + sum(max(layer) for layer in self._layers)
        else:
            cpu_s, gpu_s = (sum(reads) for reads in zip(*self._layers, strict=True))
            self.seconds += max(cpu_s, gpu_s + dense_s)
        self._layers.clear()
