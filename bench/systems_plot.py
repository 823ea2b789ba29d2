"""A picture of systems side by side: tokens per second on one machine, a panel a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.policies import Cell

OURS, OTHERS, BOUND = "#0072B2", "#777777", "#D55E00"
"""Of Okabe and Ito's palette, whose colours stay apart under the common colour blindnesses."""
MARKED = 0.25


def draw(cells: Sequence["Cell"], file: Path, *, machine: str = "rtx4090-desktop", routing: str = "fitted") -> None:
    """Write the picture of one sequence on a machine, by share of the experts that the GPU holds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [c for c in cells if (c.place.machine, c.place.routing, c.place.n_sequences) == (machine, routing, 1)]
    models = list(dict.fromkeys(cell.place.model for cell in shown))
    figure, panels = pyplot.subplots(2, (len(models) + 1) // 2, figsize=(11, 7.5), layout="constrained")
    for axes, model in zip(panels.flat, models, strict=False):
        _panel(axes, [cell for cell in shown if cell.place.model == model])
        axes.set_title(model, loc="left", fontsize=11)
    for axes in panels[-1]:
        axes.set_xlabel("tokens/s, virtual time")
    figure.suptitle(
        f"One sequence on {machine}, simulated: 12.5, 25 (dot) and 50 % of the experts on the GPU.\n"
        "Orange: what the same bytes allow at 25 %, at each reader's full rate, nothing else taking time.",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _panel(axes: "Axes", cells: Sequence["Cell"]) -> None:
    speed = {(cell.system, cell.place.resident): cell.tokens_per_s for cell in cells}
    marked = {cell.system: cell for cell in cells if cell.place.resident == MARKED}
    order = sorted(marked, key=lambda system: marked[system].tokens_per_s)
    for row, system in enumerate(order):
        colour = OURS if system == "fiddler" else OTHERS
        shares = sorted(share for name, share in speed if name == system)
        axes.plot([speed[system, share] for share in shares], [row] * len(shares), "|-", color=colour, lw=1.5)
        axes.plot(marked[system].tokens_per_s, row, "o", color=colour, ms=7)
        bound = marked[system].tokens_per_s / marked[system].of_bound
        axes.plot(bound, row, "|", color=BOUND, ms=14, mew=2)
    axes.set_yticks(range(len(order)), order)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "fiddler" else "normal")
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
