"""What a loaded model runs with: its calibrated kernels, the threads, a lane for a forward that nobody drives."""

from collections.abc import Mapping

from fiddler.config import EngineConfig, most_threads
from fiddler.devices.calibrate import MIN_BYTES, calibrated_kernels
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.kernels import Kernels
from fiddler.devices.threads import set_own_threads
from fiddler.errors import ConfigError
from fiddler.given import shown
from fiddler.lanes.experts import ComputeLane
from fiddler.models import dense
from fiddler.models.loaded import LoadedModel


def checked(config: object) -> EngineConfig:
    """Return the options a caller gave, or the defaults for `None`. Raises `ConfigError` for anything else."""
    if config is None:
        return EngineConfig()
    if isinstance(config, EngineConfig):
        return config
    instead = "EngineConfig(...)"
    if isinstance(config, str):
        instead = f"EngineConfig(device={shown(config)})"
    elif isinstance(config, Mapping):
        instead = "EngineConfig.from_mapping(...)"
    raise ConfigError(f"config must be an EngineConfig, not {shown(config)}; write {instead}")


def choose_kernels(loaded: LoadedModel, config: EngineConfig, *, with_dense: bool = True) -> Kernels:
    """Return the CPU's kernels for a model's experts and its dense part, calibrated as `config` says."""
    samples = [loaded.weights(layer, 0) for layer in range(len(loaded.n_experts))]
    experts = [matrix for sample in samples for matrix in (*sample.up, sample.down)]
    matrices = [*experts, *dense.matrices(loaded.model)] if with_dense else experts
    return calibrated_kernels(matrices, config)


def choose_threads(loaded: LoadedModel, config: EngineConfig, default: int) -> None:
    """Set this thread's torch threads as `config` says, or to one for a model of tiny experts, or to `default`.

    Waking a second thread costs more than a small matmul, and where another program has that thread's core, every
    one of them waits for it.
    """
    sample = loaded.weights(0, 0)
    tiny = all(matrix.nbytes < MIN_BYTES for matrix in (*sample.up, sample.down))
    set_own_threads(config.threads or (1 if tiny else min(default, most_threads())))


def compute_lane(loaded: LoadedModel, kernels: Kernels) -> ComputeLane:
    """Return what runs a model's experts for a forward that nobody drives."""
    return ComputeLane(CpuDevice(loaded.weights, loaded.formulas, kernels), loaded.n_experts)
