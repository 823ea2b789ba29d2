"""Results as the templates of documents see them.

A template is the body of an f-string. It sees each file of `bench/results` by its stem (dashes are underscores), a
few builtins, and the functions of this module and of `bench.tables`. Templates are trusted as code is: whoever may
write a document may run what he likes when it is checked.
"""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean, mean, median
from typing import Any

RESULTS = Path(__file__).parent / "results"
WORLD = Path(__file__).parent / "world.json"
"""What a prediction of published speeds goes by; templates see it as `world`."""


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


def load(folder: Path = RESULTS, world: Path = WORLD) -> dict[str, Record]:
    """Return every result by its name in templates."""
    files = {file.stem.replace("-", "_"): file for file in sorted(folder.glob("*.json"))}
    return {name: read(file) for name, file in ({"world": world} | files).items()}


def read(file: Path) -> Record:
    """Return a file's JSON object."""
    found: Record = json.loads(file.read_text(encoding="utf-8"), object_hook=Record)
    return found


def evaluate(template: str, names: Mapping[str, Any]) -> str:
    """Return what a template says; raises whatever its expressions raise, and `SyntaxError`."""
    # The blank keeps a last quotation mark from running into the three that end the string.
    value: str = eval(f'f"""{template} """', {"__builtins__": {}, **BUILTINS, **names})
    return value[:-1]


def cited(template: str, results: Mapping[str, Record]) -> list[Record]:
    """Return the results that a template names."""
    nodes = ast.walk(ast.parse(f'f"""{template} """', mode="eval"))
    found = dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name))
    return [results[name] for name in found if name in results]


def label(result: Record) -> str:
    """Say where a result was taken, in the words that a document must have near its numbers.

    Virtual time and replays do not depend on the machine that computed them.
    """
    if result.get("virtual"):
        return "virtual time"
    if result.get("bench") == "cache":
        return "replayed"
    if "machine" not in result:
        return ""
    machine = result.machine
    return f"{machine.n_cores} cores, {_cpu(machine)}, {_gpu(machine)}"


def _cpu(machine: Record) -> str:
    words = machine.cpu.replace("(R)", "").replace("(TM)", "").partition("@")[0].split()
    name = " ".join(word for word in words if word not in ("CPU", "Processor") and not word.endswith("-Core"))
    wide = [said for flag, said in (("amx_bf16", "AMX"), ("avx512f", "AVX-512")) if flag in machine.isa]
    return f"{name} with {wide[0]}" if wide else name


def _gpu(machine: Record) -> str:
    found = machine.get("gpu")
    return str(found.name if isinstance(found, Record) else found) if found else "no GPU"


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


def percent(share: float, digits: int = 0, sign: str = "") -> str:
    """Return a share in per cent; `sign` may be '+'."""
    return f"{100.0 * share:{sign}.{digits}f} %".replace("-", "\N{MINUS SIGN}")


def span(values: Iterable[float], spec: str = ".2f") -> str:
    """Return the least and the greatest of some values."""
    ordered = sorted(values)
    return f"{ordered[0]:{spec}} to {ordered[-1]:{spec}}"


BUILTINS: dict[str, Any] = {
    f.__name__: f for f in (abs, all, any, len, list, max, min, round, set, sorted, str, sum)
}
HELPERS: dict[str, Any] = {f.__name__: f for f in (label, pick, one, percent, span, mean, median, geometric_mean)}
