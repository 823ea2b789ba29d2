"""Shows replays as a table, as JSON, and as a picture: reads over Belady's by the size of the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil, log
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fiddler.errors import ConfigError
from fiddler.lab.replay import BELADY, Score
from fiddler.recording import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDEST = 10_000
"""Columns: wider than any table."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One routing under every policy and with every size of the cache."""

    name: str
    trace: RoutingTrace
    shares: Mapping[int, float]
    """The shares of experts that were asked for, by the number of slots."""
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
        """Return a line that names the replay."""
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
    """Print a table for each routing, as wide as it is."""
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


PICTURES = (".png", ".svg", ".pdf")
# Okabe and Ito's palette without its yellow: its colours stay apart under the common colour blindnesses. With more
# policies than colours, the marker and the dashes tell them apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX*"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_TICKS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)
_N_COLUMNS = 3
"""Traces side by side."""
_LINE_HEIGHT = 0.042
"""Height of a label, as a share of the picture's height."""


def check(file: Path) -> None:
    """Raise `ConfigError` where `write` could not write such a file."""
    if file.suffix not in PICTURES:
        raise ConfigError(f"{file}: a plot is one of {', '.join(PICTURES)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib: pip install 'fiddler-moe[plot]'")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}")


def write(results: Sequence[Replayed], file: Path) -> None:
    """Write the picture. Raises `ConfigError` where the file cannot be written."""
    try:
        draw(results).savefig(file, dpi=150)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error}") from error


def draw(results: Sequence[Replayed]) -> "Figure":
    """Return a picture with a panel for each routing."""
    from matplotlib.figure import Figure

    n_columns = min(_N_COLUMNS, len(results))
    n_rows = ceil(len(results) / n_columns)
    figure = Figure(figsize=(2.0 + 5.6 * n_columns, 0.6 + 4.6 * n_rows), layout="constrained")
    looks = _looks(results)
    for number, result in enumerate(results):
        _panel(figure.add_subplot(n_rows, n_columns, number + 1), result, looks)
    figure.suptitle(
        "Expert reads as a multiple of Belady's, replayed", x=0.01, ha="left", fontsize=13, fontweight="bold"
    )
    return figure


def _looks(results: Sequence[Replayed]) -> dict[str, dict[str, object]]:
    """Return how each policy's line looks, the same in every panel."""
    policies = dict.fromkeys(score.policy for result in results for score in result.scores if not score.knows)
    looks: dict[str, dict[str, object]] = {}
    for number, policy in enumerate(policies):
        turn, colour = divmod(number, len(_COLOURS))
        looks[policy] = {
            "color": _COLOURS[colour],
            "linestyle": _DASHES[turn % len(_DASHES)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linewidth": 1.8,
        }
    return looks


def _bound(policy: str) -> dict[str, object]:
    colour = "black" if policy == BELADY else "#777777"
    return {"color": colour, "linestyle": (0, (2, 2)), "linewidth": 1.2, "marker": ".", "markersize": 4}


def _panel(axes: "Axes", result: Replayed, looks: dict[str, dict[str, object]]) -> None:
    ranked = result.ranked()
    for policy, scores in ranked:
        look = looks.get(policy) or _bound(policy)
        axes.plot(range(len(scores)), [score.ratio for score in scores], **look)  # type: ignore[arg-type]
    _frame(axes, result, max(score.ratio for score in result.scores))
    _labels(axes, [(policy, scores[-1], looks.get(policy)) for policy, scores in ranked])


def _frame(axes: "Axes", result: Replayed, highest: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(0.97, highest * 1.06)
    ticks = [tick for tick in _TICKS if tick <= highest * 1.06]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    shares = [f"{100 * share:g} %\n{n_slots:,}" for n_slots, share in result.shares.items()]
    axes.set_xticks(range(len(shares)), shares)
    axes.margins(x=0.04)
    axes.set_xlabel("experts that have a slot: share and number")
    axes.set_ylabel("expert reads, Belady's = 1, logarithmic")
    axes.set_title(result.title().replace(": ", "\n", 1), loc="left", fontsize=9, color="#444444")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _labels(axes: "Axes", ends: Sequence[tuple[str, Score, dict[str, object] | None]]) -> None:
    """Name the lines where they end, apart from each other; a thin line leads to a name that had to move."""
    low, high = (log(limit) for limit in axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[1].ratio)
    heights = [(log(score.ratio) - low) / (high - low) for _, score, _ in ends]
    last = round(axes.dataLim.x1)
    for (policy, _, look), height, place in zip(ends, heights, spread(heights, _LINE_HEIGHT), strict=True):
        colour = str((look or _bound(policy))["color"])
        axes.annotate(
            policy,
            (last, height),
            (1.045, place),
            xycoords=("data", "axes fraction"),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 5},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places moved so little that neighbours are at least `gap` apart."""
    blocks: list[tuple[float, int]] = []  # of places that touch: where the first would be, how many
    for place in places:
        start, n = place, 1
        while blocks and blocks[-1][0] + gap * blocks[-1][1] > start:
            before, m = blocks.pop()
            start, n = (before * m + (start - gap * m) * n) / (m + n), m + n
        blocks.append((start, n))
    return [start + gap * i for start, n in blocks for i in range(n)]
