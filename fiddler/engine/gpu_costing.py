"""A calibration on a GPU: experts, the link, rows on their way, the dense part and the host's own work."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import transformers

from fiddler.config import EngineConfig
from fiddler.cost.model import CostModel
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.measure import Measured
from fiddler.engine.costing import Calibration, calibrate
from fiddler.engine.measure_dense import DenseBench, Extent
from fiddler.engine.measure_experts import GpuExperts
from fiddler.lanes.gpu_crossing import GpuCrossing
from fiddler.lanes.gpu_jobs import GpuJobs
from fiddler.lanes.watch import Watch
from fiddler.models.kv_arena import KvArena
from fiddler.models.loaded import ServableModel


def calibrate_gpu(loaded: ServableModel, jobs: GpuJobs, config: EngineConfig, *, anew: bool = False) -> Calibration:
    """Return what a model takes on a GPU: from the stored file, or measured and stored; see `calibrate`.

    The model's dense part is there, and no lane works. `jobs` are the engine's: slots are overwritten, but what
    they have counted and queued is left alone. Raises what a step raises, such as `torch.OutOfMemoryError`.
    """
    try:
        return calibrate(GpuBench.of(loaded, jobs, config), loaded, config, anew=anew)
    finally:
        jobs.gpu.reclaim()


@dataclass(frozen=True, slots=True)
class GpuBench:
    """Measures with the engine's own devices, in the thread that `Gpu.enter` was called in."""

    loaded: ServableModel
    experts: GpuExperts
    config: EngineConfig

    @classmethod
    def of(cls, loaded: ServableModel, jobs: GpuJobs, config: EngineConfig) -> "GpuBench":
        """Measure with the devices of an engine's jobs."""
        gpu = jobs.gpu
        own = GpuJobs(gpu, GpuCrossing(gpu, Watch()), jobs.host, jobs.experts, jobs.copying)
        return cls(loaded, GpuExperts(own, loaded.n_experts), config)

    @property
    def host(self) -> CpuDevice:
        """The CPU, and the experts on it."""
        return self.experts.jobs.host

    @property
    def device_name(self) -> str:
        """What the costs belong to: the GPU, the dense part, and how far an engine can go with it."""
        model = f"{_outline(self.loaded.model)}, transformers {transformers.__version__}"
        how = f"packed {self.loaded.packed}, {Extent.of(self.loaded, self.config)}"
        return f"cuda {self.experts.jobs.gpu.name}, {self.experts.n_slots} slots, {model}, {how}"

    def way(self, layer: int) -> str:
        """Say how a layer's experts come to their slots."""
        n, n_experts = self.experts.n_pinned(layer), self.loaded.n_experts[layer]
        return f", {n} of {n_experts} pinned" if self.experts.n_slots else ""

    def measure(self, layers: Sequence[int]) -> Measured:
        """Measure the experts of layers that share a shape and a way."""
        return self.experts.measure(layers)

    def completed(self, costs: CostModel) -> CostModel:
        """Measure rows on their way, the dense part, and the host's work for a layer."""
        costs = replace(costs, moves=self.experts.moves(0))
        gpu = self.experts.jobs.gpu
        arena = KvArena(Extent.of(self.loaded, self.config).most)
        slots = self.experts.n_slots > 0
        dense, host_s = DenseBench(self.loaded, gpu, arena, self.config, costs, slots=slots).measure()
        arena.check()
        assert arena.n_free == arena.n_tokens, "keys and values are still held"
        return replace(costs, dense=dense, host_s=host_s)


def _outline(model: torch.nn.Module) -> str:
    """Return what tells a dense part from others: the names, shapes and dtypes of its weights."""
    weights = "; ".join(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters())
    return hashlib.sha256(weights.encode()).hexdigest()[:12]
