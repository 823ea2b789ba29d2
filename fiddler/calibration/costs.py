"""Makes a model's cost model, from a described machine's figures or from measurements on this machine."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Literal

from fiddler.calibration.kernels import calibration_file
from fiddler.calibration.measure import Measured, Measures
from fiddler.config import EngineConfig
from fiddler.cost.model import CostModel
from fiddler.devices.cpu import CpuDevice
from fiddler.formats.packed import kind
from fiddler.given import read_json
from fiddler.models.loaded import LoadedModel

N_LAYERS = 4
"""Number of layers whose experts make a sample."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Seconds measured at a row count that no curve was fitted to, and the curve's prediction."""

    shape: int
    """The expert shape, by the first layer that has it."""
    lane: Literal["cpu", "gpu"]
    n_rows: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative error of the curve, `|predicted / measured - 1|`."""
        return abs(self.predicted_s / self.measured_s - 1.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """A cost model measured here, with its errors at row counts it was not fitted to."""

    costs: CostModel
    held_out: tuple[HeldOut, ...]
    file: Path
    fresh: bool
    """Whether it was measured now; otherwise it was read from the file."""


def calibrate(bench: Measures, loaded: LoadedModel, config: EngineConfig, *, anew: bool = False) -> Calibration:
    """Return this machine's costs for a model: from the stored file, or measured and stored.

    Layers whose experts have the same shape, and reach the device the same way, are measured once. Where the file
    cannot be written, nothing is stored and the next start measures again.
    """
    shapes = [_shape(bench.host, layer) + bench.way(layer) for layer in range(len(loaded.n_experts))]
    file = _file(shapes, bench, config)
    stored = None if anew else _read(file, len(shapes))
    if stored is not None:
        return Calibration(*stored, file, fresh=False)
    by_shape: dict[str, Measured] = {}
    for layer, shape in enumerate(shapes):
        if shape not in by_shape:
            n_experts = loaded.n_experts[layer]
            alike = [i for i, s in enumerate(shapes) if (s, loaded.n_experts[i]) == (shape, n_experts)]
            by_shape[shape] = bench.measure(alike[:N_LAYERS])
    first = next(iter(by_shape.values()))
    experts = tuple(by_shape[s].costs for s in shapes)
    costs = bench.completed(CostModel(experts=experts, contention=first.contention))
    held_out = tuple(h for i, measured in enumerate(by_shape.values()) for h in _held_out(i, measured))
    _write(file, costs, held_out)
    return Calibration(costs, held_out, file, fresh=True)


def _held_out(shape: int, measured: Measured) -> Iterator[HeldOut]:
    costs = measured.costs
    for n, seconds in measured.cpu_held_out:
        yield HeldOut(shape, "cpu", int(n), seconds, costs.cpu(n))
    for n, seconds in measured.gpu_held_out:
        yield HeldOut(shape, "gpu", int(n), seconds, costs.gpu(n))


def _read(file: Path, n_layers: int) -> tuple[CostModel, tuple[HeldOut, ...]] | None:
    """Read a stored calibration; one that is missing or damaged is measured again."""
    try:
        value = read_json(file)
        costs = CostModel.from_json(value["costs"])
        held_out = tuple(HeldOut(**h) for h in value["held_out"])
        read_whole = all(isinstance(h.n_rows, int) and 0 < h.measured_s < inf and h.error >= 0 for h in held_out)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
        return None
    return (costs, held_out) if read_whole and len(costs.experts) == n_layers else None


def _write(file: Path, costs: CostModel, held_out: tuple[HeldOut, ...]) -> None:
    """Store a calibration, whole or not at all."""
    content = json.dumps({"costs": costs.as_json(), "held_out": [asdict(h) for h in held_out]}, indent=1)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(content, encoding="utf-8")
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _shape(host: CpuDevice, layer: int) -> str:
    weights = host.weights(layer, 0)
    return ", ".join(f"{tuple(m.shape)} {kind(m)}" for m in weights.matrices)


def _cpu() -> str:
    """Return the CPU's name: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _file(shapes: list[str], bench: Measures, config: EngineConfig) -> Path:
    key = hashlib.sha256("; ".join([*shapes, bench.device_name, config.kernels, _cpu()]).encode()).hexdigest()[:12]
    kernels = calibration_file(config)
    return kernels.with_name(kernels.name.replace("kernels-", f"costs-{key}-"))
