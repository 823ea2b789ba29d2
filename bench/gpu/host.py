"""The host's experts and memory: what the CPU lane reads, by rows, and what there is to read at most."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor

from bench import ceilings, kernels
from bench.gpu.clock import spread
from bench.gpu.context import Context
from fiddler.config import EngineConfig
from fiddler.devices.calibrate import calibrated_kernels
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

AT_ONCE = 8
"""Experts of a job, as many as a token of Qwen3-30B-A3B visits in a layer."""
MOST_ROWS = 16
TINY = (64, 32)
"""(hidden, intermediate) of experts whose weights take no time to read."""


def expert(hidden: int, intermediate: int, device: torch.device | None = None) -> ExpertWeights:
    """Return a gated expert in bfloat16, gate and up as one matrix."""
    up = torch.full((2 * intermediate, hidden), 0.01, dtype=torch.bfloat16, device=device)
    return ExpertWeights((up,), torch.full((hidden, intermediate), 0.01, dtype=torch.bfloat16, device=device))


@dataclass(frozen=True, slots=True)
class HostExperts:
    """Experts that together exceed the caches, run `AT_ONCE` by `AT_ONCE` on one row each."""

    device: CpuDevice
    jobs: Sequence[Sequence[ExpertWeights]]
    loads: Sequence[Load]
    rows: Tensor
    out: Tensor
    nbytes: int

    @classmethod
    def of(cls, shape: tuple[int, int], nbytes: int) -> Self:
        """Make experts of a shape that hold so much together, with the kernels that a calibration picks."""
        sample = expert(*shape)
        n_jobs = -(-nbytes // (sample.nbytes * AT_ONCE))
        jobs = [[expert(*shape) for _ in range(AT_ONCE)] for _ in range(n_jobs)]
        picked = calibrated_kernels([*sample.up, sample.down], EngineConfig())
        device = CpuDevice(lambda _, number: jobs[0][number], (kernels.SWIGLU,), picked)
        rows = torch.full((AT_ONCE, shape[0]), 0.5, dtype=torch.bfloat16)
        loads = [Load(i, i, i + 1) for i in range(AT_ONCE)]
        return cls(device, jobs, loads, rows, empty_results(rows), n_jobs * AT_ONCE * sample.nbytes)

    def gbs(self) -> float:
        """Run every expert once; returns the GB/s of their weights."""
        return self.nbytes / self.seconds() / 1e9

    def seconds(self) -> float:
        """Run every expert once."""
        began_s = perf_counter()
        for job in self.jobs:
            self.device.run(0, self.loads, job, self.rows, self.out)
        return perf_counter() - began_s


def host(ctx: Context) -> dict[str, Any]:
    """Measure what the host reads and multiplies at most: the best pass of several ways, in a thread of its own."""
    found = ceilings.measure_aside(ctx.sizes.read_bytes)
    return {
        "read_gbs": found.gbs,
        "ways_to_read": {way: spread([one.low, one.median, one.high]) for way, one in found.ways_to_read.items()},
        "flop_per_s": found.flop_per_s,
        "threads": torch.get_num_threads(),
    }


def experts(ctx: Context) -> list[dict[str, Any]]:
    """Measure whole experts by shape and rows; GB/s of their weights. As `bench.kernels` does."""
    sizes, found = ctx.sizes, list[dict[str, Any]]()
    for name, (hidden, intermediate) in sizes.shapes.items():
        sample = expert(hidden, intermediate)
        picked = calibrated_kernels([*sample.up, sample.down], EngineConfig())
        for n_rows in [n for n in sizes.rows if n <= MOST_ROWS]:
            rate = kernels.expert_rate(hidden, intermediate, n_rows, picked, sizes.read_bytes, sizes.passes)
            about = {"shape": name, "hidden": hidden, "intermediate": intermediate, "n_rows": n_rows}
            found.append({**about, "gbs": spread([rate.gbs.low, rate.gbs.median, rate.gbs.high])})
    return found


def dispatch(ctx: Context) -> dict[str, Any]:
    """Measure an expert whose weights take no time: what is left is the host's own."""
    tiny = HostExperts.of(TINY, 1)
    taken = [tiny.seconds() / AT_ONCE for _ in range(max(ctx.sizes.passes * 20, 20))]
    return {"expert_s": spread(taken)}
