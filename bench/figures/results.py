"""The committed results that pictures are drawn from."""

from bench.report import Record, label, read

MACHINE = "2core-epyc"
"""The machine whose measurements are shown: how their files' names end."""


def measured(bench: str) -> Record:
    """Return the report of a bench on `MACHINE`."""
    return read(f"{bench}-{MACHINE}")


def measured_on(report: Record) -> str:
    """Say on what, with what and when a report was measured."""
    day = report.machine.date.partition("T")[0]
    return f"Measured on {label(report)}; torch {report.machine.torch}; {day}"
