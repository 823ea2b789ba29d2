"""What `world.json` says: published speeds, and the constants that they are predicted from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fiddler.cost.shape import DENSE_BYTES, ModelShape

WORLD = Path(__file__).parent / "world.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One published speed, in tokens per second, and what it was measured with."""

    table: str
    system: str
    machine: str
    model: str
    slots: int
    lengths: str
    """The name of a list of (prompt, made) tokens; the speed is the mean over it."""
    metric: Literal["decode", "end-to-end"]
    published: float
    source: str
    gpu_layers: int | None = None
    """Layers that the GPU has whole, of a system that runs the others on the CPU with all they have."""


@dataclass(frozen=True, slots=True)
class World:
    """`world.json`, its constants without their sources."""

    constants: Mapping[str, Any]
    machines: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Mapping[str, Any]]
    systems: Mapping[str, Mapping[str, Any]]
    lengths: Mapping[str, Any]
    cells: tuple[Cell, ...]

    @classmethod
    def load(cls, file: Path = WORLD) -> "World":
        """Read the file."""
        content = json.loads(file.read_text(encoding="utf-8"))
        named = {key: _values(content[key]) for key in ("constants", "machines", "models", "systems", "lengths")}
        return cls(**named, cells=tuple(Cell(**cell) for cell in content["cells"]))

    def shape(self, model: str) -> ModelShape:
        """Return a model's shape with the weights that it was run with."""
        values = self.models[model]
        shape = ModelShape.load(values.get("shape", model))
        return replace(shape, name=model, bytes_per_weight=values["bytes_per_weight"])

    def cpu_share(self, cell: Cell) -> float | None:
        """Return what the system's kernels read, as a share of the DRAM bandwidth; `None` if they read nothing."""
        few_bits = self.models[cell.model]["bytes_per_weight"] < DENSE_BYTES
        share = self.systems[cell.system].get("cpu_share_4bit" if few_bits else "cpu_share")
        return None if share is None else float(share)


def _values(found: Any) -> Any:
    if not isinstance(found, dict):
        return found
    return found["value"] if "value" in found else {key: _values(value) for key, value in found.items()}
