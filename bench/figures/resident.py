"""How speed grows with the share of experts that the GPU holds: a panel a model, a line a system."""

from collections.abc import Sequence
from math import log

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures import sources, style
from bench.report import Record
from fiddler.cli.curves import spread

BOUND = "bound"
LOOKS = {
    BOUND: {"color": style.BOUND, "ls": "--", "lw": 1.5},
    "fiddler": {"color": style.OURS, "marker": "D", "lw": 3.0},
    "hybrimoe-no-prefetch": {"color": style.SKY, "marker": "s", "lw": 1.5},
    "freetoken": {"color": style.GREEN, "marker": "^", "lw": 1.5},
    "fiddler-2024": {"color": style.PURPLE, "marker": "v", "lw": 1.5},
    "llama.cpp": {"color": style.ORANGE, "marker": "P", "lw": 1.5},
}
"""The lines that are told apart and named; other systems are pale."""
OTHERS = {"color": "#BBBBBB", "lw": 1.0, "zorder": 1}
GAP = 0.075
"""Between two names, as a share of a panel's height."""


def draw() -> Figure:
    """Return the picture of the committed run."""
    found = sources.shown(sources.load())
    lines = (f"{sources.WHERE} Pale: other systems.", sources.BOUND)
    figure = style.figure(6.8, "Tokens per second by the share of experts on the GPU", lines)
    models = sources.models(found)
    panels = figure.subplots(-(-len(models) // 2), 2, sharex=True, squeeze=False)
    for axes, model in zip(panels.flat, models, strict=True):
        _panel(axes, [cell for cell in found if cell.place.model == model])
        axes.set_title(model)
    style.labels(figure, "share of the experts that the GPU holds", "tokens/s in virtual time, logarithmic")
    return figure


def _panel(axes: Axes, place: Sequence[Record]) -> None:
    shares, lines = sources.shares(place), _lines(place)
    for name, speeds in lines.items():
        axes.plot(shares, speeds, **LOOKS.get(name, OTHERS))
    lowest, highest = min(map(min, lines.values())) / 1.1, max(map(max, lines.values())) * 1.1
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.set_ylim(lowest, highest)
    style.log_ticks(axes.yaxis, style.round_numbers(lowest, highest))
    axes.grid(axis="y")
    _names(axes, {name: speeds[-1] for name, speeds in lines.items() if name in LOOKS}, shares[-1])


def _lines(place: Sequence[Record]) -> dict[str, list[float]]:
    """Return speeds by share, of every system and of the bound."""
    ordered = sorted(place, key=lambda cell: cell.place.resident)
    lines = {BOUND: [sources.bound(cell) for cell in ordered if cell.system == sources.OURS]}
    for system in sources.ranked(place)[::-1]:
        lines[system] = [cell.tokens_per_s for cell in ordered if cell.system == system]
    return lines


def _names(axes: Axes, ends: dict[str, float], last: float) -> None:
    """Name the lines where they end, apart from each other."""
    low, high = (log(limit) for limit in axes.get_ylim())
    names = sorted(ends, key=ends.__getitem__)
    heights = [(log(ends[name]) - low) / (high - low) for name in names]
    for name, height, place in zip(names, heights, spread(heights, GAP), strict=True):
        colour = LOOKS[name]["color"]
        axes.annotate(
            name,
            (last, height),
            (1.05, place),
            xycoords=("data", "axes fraction"),
            textcoords="axes fraction",
            va="center",
            fontsize=style.SMALL,
            fontweight="bold" if name == sources.OURS else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "relpos": (0, 0.5), "shrinkB": 4},
        )
