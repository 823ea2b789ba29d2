"""What pictures are drawn from: committed measurements of one machine, and the run of `bench.policies`."""

from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from bench.report import Record, label, read

MEASURED_ON = "2core-epyc"
"""The machine whose measurements are shown: how their files' names end."""
MACHINE, ROUTING = "rtx4090-desktop", "fitted"
"""What is shown of the simulations, one sequence of it."""
OURS = "fiddler"
WHERE = f"One sequence on {MACHINE}, simulated, in virtual time; {ROUTING} routing."
BOUND = "Dashed, the physical bound: what Fiddler reads, each reader at its full rate, nothing else taking time."


def measured(bench: str) -> Record:
    """Return the report of a bench on that machine."""
    return read(f"{bench}-{MEASURED_ON}")


def measured_on(report: Record) -> str:
    """Say on what, with what and when a report was measured."""
    day = report.machine.date.partition("T")[0]
    return f"Measured on {label(report)}; torch {report.machine.torch}; {day}"


def load() -> list[Record]:
    """Return the committed cells."""
    return list(read("policies-virtual").cells)


def shown(cells: Iterable[Record]) -> list[Record]:
    """Return those of one sequence on `MACHINE`. Raises `ValueError` if there are none."""
    wanted = (MACHINE, ROUTING, 1)
    found = [c for c in cells if (c.place.machine, c.place.routing, c.place.n_sequences) == wanted]
    if not found:
        raise ValueError(f"no cell of one sequence on {MACHINE} with {ROUTING} routing")
    return found


def models(cells: Sequence[Record]) -> list[str]:
    """Return the models, in their order."""
    return list(dict.fromkeys(cell.place.model for cell in cells))


def shares(cells: Sequence[Record]) -> list[float]:
    """Return the shares of experts on the GPU, the least first."""
    return sorted({cell.place.resident for cell in cells})


def ranked(cells: Sequence[Record]) -> list[str]:
    """Return the systems, the fastest first, by their mean over all places."""
    speeds: dict[str, list[float]] = {}
    for cell in cells:
        speeds.setdefault(cell.system, []).append(cell.tokens_per_s)
    return sorted(speeds, key=lambda system: -geometric_mean(speeds[system]))


def bound(cell: Record) -> float:
    """Return the tokens per second that a cell's reads allow."""
    return cell.tokens_per_s / cell.of_bound
