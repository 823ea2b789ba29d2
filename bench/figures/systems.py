"""Every system in every place: tokens per second, a column a model, a row a share of experts on the GPU."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures import sources, style
from bench.report import Record

MARGIN = 1.25
"""Left and right of what is shown, as a factor."""


def draw() -> Figure:
    """Return the picture of the committed run."""
    return picture(sources.load())


def picture(run: Sequence[Record]) -> Figure:
    """Return the picture of a run of `bench.policies`. Raises `ValueError` as `sources.shown` does."""
    found = sources.shown(run)
    models, shares, order = sources.models(found), sources.shares(found), sources.ranked(found)[::-1]
    figure = style.figure(7.0, f"Tokens per second by {len(order)} systems' rules", (sources.WHERE, sources.BOUND))
    panels = figure.subplots(len(shares), len(models), sharex="col", sharey=True, squeeze=False)
    for line, share in zip(panels, shares, strict=True):
        for axes, model in zip(line, models, strict=True):
            place = [cell for cell in found if (cell.place.model, cell.place.resident) == (model, share)]
            _panel(axes, {cell.system: cell for cell in place}, order)
        line[0].set_ylabel(f"{100 * share:g} % on the GPU", fontweight="bold")
    for axes, model in zip(panels[0], models, strict=True):
        axes.set_title(model)
        _scale(axes, [cell for cell in found if cell.place.model == model])
    style.labels(figure, "tokens/s in virtual time, logarithmic")
    return figure


def _panel(axes: Axes, place: Mapping[str, Record], order: Sequence[str]) -> None:
    for row, system in enumerate(order):
        ours = system == sources.OURS
        speed = place[system].tokens_per_s
        axes.plot(speed, row, "D" if ours else "o", color=style.OURS if ours else style.GREY, ms=7 if ours else 5.5)
    if sources.OURS in place:
        axes.axvline(sources.bound(place[sources.OURS]), color=style.BOUND, ls="--", lw=1.5, zorder=1)
    style.rows(axes, order, sources.OURS)


def _scale(axes: Axes, column: Sequence[Record]) -> None:
    """Let a model's panels show all its speeds and bounds."""
    low = min(cell.tokens_per_s for cell in column) / MARGIN
    high = (
        max(sources.bound(cell) if cell.system == sources.OURS else cell.tokens_per_s for cell in column) * MARGIN
    )
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    style.log_ticks(axes.xaxis, style.round_numbers(low, high, most=5))
