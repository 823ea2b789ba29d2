"""Puts the parts together: a loaded model, a device, its calibrated kernels, a lane."""

from fiddler.config import EngineConfig
from fiddler.devices.calibrate import calibrated_kernels
from fiddler.devices.cpu import CpuDevice
from fiddler.lanes.compute import ComputeLane
from fiddler.models.loaded import LoadedModel


def compute_lane(loaded: LoadedModel, config: EngineConfig) -> ComputeLane:
    """Return the lane that runs a model's experts, with kernels calibrated as `config` says."""
    samples = [loaded.weights(layer, 0) for layer in range(len(loaded.n_experts))]
    matrices = [matrix for sample in samples for matrix in (*sample.up, sample.down)]
    kernels = calibrated_kernels(matrices, config)
    return ComputeLane(CpuDevice(loaded.weights, loaded.formulas, kernels), loaded.n_experts)
