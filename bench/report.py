"""Numbers for people (tables) and for machines (JSON): how they are shown, written, and read again."""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


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


def listing(title: str, cells: Sequence[Any]) -> str:
    """Return a table of cells, mappings or dataclasses of one kind: a column a field, named as in the JSON."""
    rows = [[_shown(value) for value in _fields(cell).values()] for cell in cells]
    return table(title, [*_fields(cells[0])], rows)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float | Spread) else str(value)


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


def command(name: str, about: str) -> ArgumentParser:
    """Return what reads the command line of `bench.name`; `--json` keeps the report."""
    made = ArgumentParser(
        prog=f"python -m bench.{name}", description=about, formatter_class=RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="keep the result")
    return made


def finish(options: Namespace, report: Mapping[str, Any], *shown: str) -> None:
    """Print a report under the heading of its machine, and keep it if that was asked for."""
    print(heading(report["machine"]), *shown, sep="\n")
    if options.json is not None:
        write_json(options.json, report)


def side_by_side(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], n_processes: int) -> list[Any]:
    """Return what `work` makes of each job, by processes side by side; in this one where `n_processes` is 0."""
    if not n_processes:
        return [work(*job) for job in jobs]
    with ProcessPoolExecutor(n_processes, get_context("spawn")) as pool:
        return list(pool.map(work, *zip(*jobs, strict=True)))


def _fields(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


class Record(Mapping[str, Any]):
    """A JSON object whose values are attributes too."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __getattr__(self, name: str) -> Any:
        if name in self._fields:
            return self._fields[name]
        raise AttributeError(f"no {name!r} among {', '.join(self._fields)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


@cache
def read(name: str, folder: Path = RESULTS) -> Record:
    """Return a committed result by the name of its file."""
    found: Record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"), object_hook=Record)
    return found


def pick(entries: Iterable[Record], **fields: Any) -> list[Record]:
    """Return the entries with these fields; a field may also be one of a record inside the entry."""
    return [entry for entry in entries if all(_field(entry, name) == value for name, value in fields.items())]


def one(entries: Iterable[Record], **fields: Any) -> Record:
    """Return the only entry with these fields; raises `LookupError` where there are none or several."""
    found = pick(entries, **fields)
    if len(found) != 1:
        raise LookupError(f"{len(found)} entries have {fields}")
    return found[0]


def _field(entry: Record, name: str) -> Any:
    inner = [value for value in entry.values() if isinstance(value, Record) and name in value]
    return next((record[name] for record in (entry, *inner) if name in record), None)


def label(result: Record) -> str:
    """Say where a result was taken; virtual time and replays do not depend on the machine that computed them."""
    if result.virtual:
        return "virtual time"
    if result.bench == "cache":
        return "replayed"
    about, gpu = result.machine, result.machine.get("gpu")
    words = about.cpu.replace("(R)", "").replace("(TM)", "").partition("@")[0].split()
    cpu = " ".join(word for word in words if word not in ("CPU", "Processor") and not word.endswith("-Core"))
    wide = [f" with {said}" for flag, said in (("amx_bf16", "AMX"), ("avx512f", "AVX-512")) if flag in about.isa]
    return f"{about.n_cores} cores, {cpu}{''.join(wide[:1])}, {gpu.name if gpu else 'no GPU'}"
