"""The committed results that pictures are drawn from."""

from bench.values import RESULTS, Record, label, read

MACHINE = "2core-amx"
"""The machine whose measurements are shown: how their files' names end."""


def load(name: str) -> Record:
    """Return the report of a bench by the name of its file."""
    return read(RESULTS / f"{name}.json")


def measured(bench: str) -> list[Record]:
    """Return the reports of a bench on `MACHINE`, by name. Raises `ValueError` where there are none."""
    files = sorted(RESULTS.glob(f"{bench}-{MACHINE}.json"))
    if not files:
        raise ValueError(f"{RESULTS.name} has no {bench}-{MACHINE}.json")
    return [read(file) for file in files]


def measured_on(report: Record) -> str:
    """Say on what, with what and when a report was measured."""
    day = report.machine.date.partition("T")[0]
    return f"Measured on {label(report)}; torch {report.machine.torch}; {day}"
