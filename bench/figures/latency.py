"""Fiddler and every peer on the same weights: decoding speed, a panel a model, measured."""

from collections.abc import Container, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.figures import sources, style
from bench.report import Record

MODELS = ("qwen3", "mixtral", "demo")
OURS = "fiddler"
MARKERS = "osD^v"
"""By load."""
DECODING = ("single", "concurrent")
"""The scenarios that are shown."""
BAND = 0.8
"""Height of a system's row, of 1."""
ROW_INCHES, MARGINS_INCHES = 0.17, 1.75

Speeds = Mapping[tuple[str, str], Record]
"""The spread of tokens per second by system and load."""


def draw() -> Figure:
    """Return the picture of the committed runs."""
    return picture([sources.measured(f"latency-{model}") for model in MODELS])


def picture(reports: Sequence[Record]) -> Figure:
    """Return the picture of reports of `bench.latency`, which should be of one machine."""
    found = [speeds(report) for report in reports]
    systems = list(dict.fromkeys(row.system for report in reports for row in report.systems))[::-1]
    loads = list(dict.fromkeys(load for own in found for _, load in own))
    lines = (
        f"{sources.measured_on(reports[0])}.",
        "Tokens after the first of each sequence; medians, bars from low to high, systems in turns in one run.",
    )
    height = MARGINS_INCHES + ROW_INCHES * len(systems) * len(loads)
    figure = style.figure(height, "Decoding speed on the CPU, the same weights for all", lines)
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axes, report, own in zip(panels, reports, found, strict=True):
        _panel(axes, own, systems, loads, {row.system for row in report.systems})
        axes.set_title(_title(report))
        axes.set_xlabel("tokens/s, logarithmic")
    figure.legend(handles=_legend(loads), loc="outside lower left", ncols=len(loads))
    return figure


def speeds(report: Record) -> Speeds:
    """Return what ran, in the report's order."""
    ran = [row for row in report.systems if row.unavailable is None and row.scenario in DECODING]
    return {(row.system, _load(row)): row.decode_tokens_per_s for row in ran}


def _load(row: Record) -> str:
    return "1 sequence" if row.n_sequences == 1 else f"{row.n_sequences} sequences"


def _title(report: Record) -> str:
    where = report.machine
    threads = {where.n_cores: ""}.get(where.threads, f", {where.threads} thread{'s'[: where.threads != 1]}")
    return f"{report.settings.model}, {report.model.n_layers} layers{threads}"


def _panel(axes: Axes, own: Speeds, systems: Sequence[str], loads: Sequence[str], asked: Container[str]) -> None:
    style.rows(axes, systems, OURS)
    axes.set_ylim(-0.5, len(systems) - 0.5)
    for (system, load), speed in own.items():
        turn = loads.index(load)
        row = systems.index(system) + BAND * (0.5 - (turn + 0.5) / len(loads))
        _dot(axes, row, speed, MARKERS[turn], ours=system == OURS)
    ran = {system for system, _ in own}
    for system in (system for system in systems if system not in ran):
        where = {"xy": (0.02, systems.index(system)), "xycoords": ("axes fraction", "data")}
        why = "did not run" if system in asked else "not asked for"
        axes.annotate(why, **where, va="center", fontsize=style.SMALL, fontstyle="italic", color=style.GREY)
    _scale(axes, min(speed.low for speed in own.values()), max(speed.high for speed in own.values()))


def _scale(axes: Axes, low: float, high: float) -> None:
    """Leave room for a number to the right of the fastest."""
    span = high / low
    low, high = low / span**0.1, high * span**0.32
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    style.log_ticks(axes.xaxis, style.round_numbers(low, high, most=5))


def _dot(axes: Axes, row: float, speed: Record, marker: str, *, ours: bool) -> None:
    """Draw one system's median with its number, and a bar from low to high."""
    colour = style.OURS if ours else style.GREY
    axes.plot([speed.low, speed.high], [row, row], color=colour, lw=1.5)
    axes.plot(speed.median, row, marker, color=colour, mfc=_face(marker, colour), ms=6, zorder=3)
    axes.annotate(
        f"{speed.median:,.0f}" if speed.median >= 100 else f"{speed.median:.3g}",
        (speed.high, row),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=style.SMALL,
        color=colour,
        fontweight="bold" if ours else "normal",
    )


def _face(marker: str, colour: str) -> str:
    """Every other marker is hollow, to be told apart where they are small."""
    return "white" if MARKERS.index(marker) % 2 else colour


def _legend(loads: Sequence[str]) -> list[object]:
    return [
        Line2D([], [], ls="", marker=marker, color=style.GREY, mfc=_face(marker, style.GREY), label=load)
        for marker, load in zip(MARKERS, loads, strict=False)
    ]
