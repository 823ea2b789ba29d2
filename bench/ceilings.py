"""What the machine can do whatever runs on it: multiply and read."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bench import kernels
from bench.report import Spread


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of each limit the best pass counts."""

    gemm: Spread
    """Operations per second of a large bf16 matmul."""
    ways_to_read: dict[str, Spread]
    """GB/s by way."""

    @property
    def flop_per_s(self) -> float:
        """The most operations per second."""
        return self.gemm.high

    @property
    def gbs(self) -> float:
        """The most GB/s."""
        return kernels.ceiling(self.ways_to_read)

    def also(self, ways: dict[str, Spread]) -> "Ceilings":
        """Return the same with further ways to read."""
        return Ceilings(self.gemm, self.ways_to_read | ways)

    def or_better(self, other: "Ceilings") -> "Ceilings":
        """Return the better of two measurements of each."""
        ways = {way: _better(spread, other.ways_to_read[way]) for way, spread in self.ways_to_read.items()}
        return Ceilings(_better(self.gemm, other.gemm), ways)


def measure(set_bytes: int, passes: int = kernels.PASSES) -> Ceilings:
    """Measure with all of this thread's torch threads, on matrices and memory of `set_bytes`."""
    return Ceilings(kernels.gemm_flop_per_s(set_bytes, passes), kernels.read_ceiling(set_bytes, passes))


def measure_aside(set_bytes: int) -> Ceilings:
    """Measure in a thread that ends: OpenMP workers that stay behind keep an engine's from waiting actively."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(measure, set_bytes).result()


def _better(one: Spread, other: Spread) -> Spread:
    return max(one, other, key=lambda spread: spread.high)
