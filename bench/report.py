"""Numbers for people (tables) and for machines (JSON)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Summarise; `values` must not be empty."""
        ordered = sorted(values)
        return cls(median(ordered), ordered[0], ordered[-1])

    def scaled(self, factor: float) -> "Spread":
        """Return the same in another unit; `factor` must be above 0."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, header and rows, as `table` takes them."""


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a plain-text table: the first column to the left, numbers to the right."""
    lines = [list(header), *([*row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(["", title, *text])


def heading(machine: dict[str, Any]) -> str:
    """Return two lines that say where and with what the numbers were taken."""
    isa = " ".join(machine["isa"])
    return (
        f"{machine['cpu']}, {machine['n_cores']} cores, {machine['ram_gib']} GiB; {isa}\n"
        f"fiddler {machine['fiddler']} ({machine['commit']}), torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['threads']} threads, {machine['date']}, "
        f"load average {machine['load_average']:.2f}"
    )


def result(bench: str, machine: Mapping[str, Any], *, virtual: bool, **fields: Any) -> dict[str, Any]:
    """Return what a bench writes: its name, where it ran, whether its times are virtual, and its own `fields`.

    A result without times is not virtual.
    """
    return {"bench": bench, "machine": machine, "virtual": virtual, **fields}


def write_json(file: Path, value: Any) -> None:
    """Write a report; dataclasses inside are written by their fields."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1, default=_fields) + "\n")


def _fields(value: Any) -> Any:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
