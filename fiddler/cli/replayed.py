"""What replays came to, for reading and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from fiddler.lab.replay import Score
from fiddler.recording import RoutingTrace

_WIDEST = 10_000
"""Columns: wider than any table."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One trace under every policy and with every size of the cache."""

    name: str
    trace: RoutingTrace
    shares: Mapping[int, float]
    """The share of experts that was asked for, by the number of slots it is."""
    scores: tuple[Score, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences, prompts included."""
        return sum(len(recording.experts) for recording in self.trace.recordings)

    def ranked(self) -> list[tuple[str, list[Score]]]:
        """Return each policy's scores by size, first those whose ratio is least in the mean."""
        rows: dict[str, list[Score]] = {}
        for score in self.scores:
            rows.setdefault(score.policy, []).append(score)
        return sorted(rows.items(), key=lambda row: mean(score.ratio for score in row[1]))

    def title(self) -> str:
        """Say in a line what was replayed."""
        n = len(self.trace.recordings)
        sequences = "sequence" if n == 1 else "sequences"
        return (
            f"{self.trace.model} ({self.name}): {n:,} {sequences}, {self.n_tokens:,} tokens, "
            f"{len(self.trace.n_experts)} layers, {sum(self.trace.n_experts):,} experts"
        )

    def as_json(self) -> dict[str, Any]:
        """Return everything, the best policy first."""
        return {
            "name": self.name,
            "model": self.trace.model,
            "n_experts": list(self.trace.n_experts),
            "n_sequences": len(self.trace.recordings),
            "n_tokens": self.n_tokens,
            "policies": [
                {
                    "policy": policy,
                    "knows_the_future": scores[0].knows,
                    "mean_ratio": mean(score.ratio for score in scores),
                    "sizes": [self._size(score) for score in scores],
                }
                for policy, scores in self.ranked()
            ],
        }

    def _size(self, score: Score) -> dict[str, Any]:
        return {
            "resident": self.shares[score.n_slots],
            "n_slots": score.n_slots,
            "n_hits": score.replay.n_hits,
            "n_misses": score.replay.n_misses,
            "hit_rate": score.replay.hit_rate,
            "reads_per_token": score.replay.reads_per_token,
            "ratio": score.ratio,
        }

    def table(self) -> Table:
        """Return it as a table: a row a policy, three columns a size."""
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
        table.add_column("\npolicy", no_wrap=True)
        for n_slots, share in self.shares.items():
            for header in (f"  {100 * share:g} %\nhits %", f"{n_slots:,}\nreads", "slots\nratio"):
                table.add_column(header, justify="right", no_wrap=True)
        for policy, scores in self.ranked():
            cells = [cell for score in scores for cell in _cells(score)]
            table.add_row(policy, *cells, style="dim" if scores[0].knows else "")
        return table


def print_tables(results: Sequence[Replayed]) -> None:
    """Print a table for each trace, as wide as it is."""
    tables = [result.table() for result in results]
    measured = Console(width=_WIDEST)
    console = Console(highlight=False)
    console.width = max(console.width, *(measured.measure(table).maximum for table in tables))
    for result, table in zip(results, tables, strict=True):
        console.print(result.title(), soft_wrap=True)
        console.print()
        console.print(table)
        console.print()
    console.print("reads: experts read for every token; ratio: reads over Belady's", style="dim")


def _cells(score: Score) -> tuple[str, str, str]:
    played = score.replay
    return f"{100 * played.hit_rate:.1f}", f"{played.reads_per_token:.1f}", f"{score.ratio:.2f}"
