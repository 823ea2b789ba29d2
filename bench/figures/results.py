"""The committed results that pictures are drawn from."""

from bench.values import RESULTS, Record, label, read

MACHINE = "2core-epyc"
"""The machine whose measurements are shown: how their files' names end."""


def load(name: str) -> Record:
    """Return the report of a bench by the name of its file."""
    return read(RESULTS / f"{name}.json")


def measured(bench: str) -> Record:
    """Return the report of a bench on `MACHINE`."""
    return load(f"{bench}-{MACHINE}")


def measured_on(report: Record) -> str:
    """Say on what, with what and when a report was measured."""
    day = report.machine.date.partition("T")[0]
    return f"Measured on {label(report)}; torch {report.machine.torch}; {day}"
