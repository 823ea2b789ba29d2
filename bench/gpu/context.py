"""What parts are given: the GPU, how much to measure, what parts before have found, and where to write."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from bench import machine
from bench.gpu.models import Shelf
from bench.gpu.sizes import GIB, Sizes
from bench.report import result, write_json
from fiddler.config import EngineConfig
from fiddler.gpu.device import Gpu


def plain(value: Any) -> Any:
    """Return a value as it reads back from JSON."""
    return json.loads(json.dumps(value, default=_fields))


def _fields(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def said(error: BaseException) -> str:
    """Return an error in words; of a group of one, what is in it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


@dataclass(slots=True)
class Context:
    """One run. Its methods belong to the thread that has entered the GPU."""

    gpu: Gpu
    sizes: Sizes
    label: str
    """What files are called by."""
    out: Path
    scratch: Path
    """A folder for what is not kept."""
    shelf: Shelf
    began_s: float = field(default_factory=perf_counter)
    found: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What each part has found, as it was written."""
    _about: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By part, the machine as it was when the part first wrote: to describe it runs other programs."""

    @property
    def beside(self) -> Path:
        """The folder for what is no result: `bench/results` itself holds nothing else."""
        folder = self.out / f"gpu-{self.label}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def file(self, part: str) -> Path:
        """Return where a part's result is written."""
        return self.out / f"gpu-{part}-{self.label}.json"

    def keep(self, part: str, *, complete: bool = False, error: str | None = None, **fields: Any) -> None:
        """Write what a part has found so far, in place of what it had before."""
        known = {name: value for name, value in self.found.get(part, {}).items() if name not in _OWN}
        about = {"part": part, "complete": complete, "error": error}
        self.found[part] = plain({**known, **fields, **about})
        where = self._about.get(part) or self._about.setdefault(part, machine.describe())
        fields = {"label": self.label, "settings": plain(self.sizes), **self.found[part]}
        write_json(self.file(part), result("gpu", where, virtual=False, **fields))

    def known(self, part: str) -> Mapping[str, Any] | None:
        """Return what a part has found, in this run or in one before whose file is there."""
        if part not in self.found and self.file(part).is_file():
            return dict(json.loads(self.file(part).read_text(encoding="utf-8")))
        return self.found.get(part)

    def remaining_s(self, reserve_s: float = 0.0) -> float:
        """Return the seconds that are left of the run, less a reserve for what comes after."""
        return self.sizes.minutes * 60.0 - (perf_counter() - self.began_s) - reserve_s

    def engine(self, budget_gib: float | None = None, **options: Any) -> EngineConfig:
        """Return an engine's configuration; what every model of the run is made for is the same for all."""
        common = {
            "device": "cuda",
            "kv_tokens": self.sizes.kv_tokens,
            "max_context": self.sizes.kv_tokens,
            "chunk_tokens": self.sizes.chunk_tokens,
            "vram_budget": None if budget_gib is None else round(budget_gib * GIB),
        }
        return EngineConfig(**{**common, **options})


_OWN = ("part", "complete", "error")
