"""Puts the parts together: a loaded model, a device, its calibrated kernels, a lane."""

from fiddler.config import EngineConfig
from fiddler.devices.calibrate import calibrated_kernels
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.kernels import Kernels
from fiddler.lanes.compute import ComputeLane
from fiddler.models import dense
from fiddler.models.loaded import LoadedModel


def choose_kernels(loaded: LoadedModel, config: EngineConfig) -> Kernels:
    """Return the kernels for a model's experts and dense part, calibrated as `config` says."""
    samples = [loaded.weights(layer, 0) for layer in range(len(loaded.n_experts))]
    experts = [matrix for sample in samples for matrix in (*sample.up, sample.down)]
    return calibrated_kernels([*experts, *dense.matrices(loaded.model)], config)


def compute_lane(loaded: LoadedModel, kernels: Kernels) -> ComputeLane:
    """Return the lane that runs a model's experts."""
    return ComputeLane(CpuDevice(loaded.weights, loaded.formulas, kernels), loaded.n_experts)
