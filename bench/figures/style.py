"""How every picture looks and is saved: one width, one palette, letters of nine points and more."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
"""Okabe and Ito's palette without its yellow: its colours stay apart under the common colour blindnesses."""
GREY, PALE = "#666666", "#DDDDDD"
OURS, BOUND = BLUE, RED
"""Fiddler, and what physics allows: the same in every picture."""

WIDTH = 800 / 96
"""In inches: a README shows 800 px, so a point here is a point there."""
SMALL, TITLE = 9, 13
"""Points."""

_LOOK: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same outlines everywhere
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": SMALL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "path",
    "svg.hashsalt": "fiddler",  # ids are random without it
}
_NUMBER = re.compile(r"\b\d+\.\d{3,}\b")
"""In an SVG; five digits of it are finer than any screen, and half the file."""
_HEADING_INCHES, _LINE_INCHES, _GAP_INCHES = 0.36, 0.18, 0.06


@contextmanager
def applied() -> Generator[None]:
    """Draw in this style, whatever the user's matplotlib is set to."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        yield


def figure(height: float, title: str, lines: Sequence[str]) -> Figure:
    """Return an empty picture, `height` inches high, with its title and some lines under it."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    top = _HEADING_INCHES + _LINE_INCHES * len(lines) + _GAP_INCHES
    made.get_layout_engine().set(rect=(0.0, 0.0, 1.0, 1.0 - top / height))
    made.text(0.01, 1.0 - 0.08 / height, title, va="top", fontsize=TITLE, fontweight="bold")
    for number, line in enumerate(lines):
        y = 1.0 - (_HEADING_INCHES + _LINE_INCHES * number) / height
        made.text(0.01, y, line, va="top", fontsize=SMALL, color="#444444")
    return made


def labels(made: Figure, x: str, y: str | None = None) -> None:
    """Name the axes that all panels share."""
    made.supxlabel(x, fontsize=SMALL)
    if y is not None:
        made.supylabel(y, fontsize=SMALL, y=made.get_layout_engine().get()["rect"][3] / 2)


def rows(axes: Axes, names: Sequence[str], bold: str) -> None:
    """Make the y axis a list of names, the first at the bottom, and one of them bold."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == bold else "normal")


def framed(picture: Figure, height: float) -> Figure:
    """Return a picture that the command line draws, as wide as the others and with as much air around it."""
    picture.set_size_inches(WIDTH, height)
    picture.get_layout_engine().set(h_pad=0.06)
    return picture


def round_numbers(low: float, high: float, most: int = 8) -> list[float]:
    """Return round numbers between two limits, about evenly apart on a logarithmic axis; `most` if that can be."""
    for heads in ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [n for power in range(-6, 10) for head in heads if low <= (n := head * 10**power) <= high]
        if len(found) <= most:
            break
    return found


def log_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Put plain numbers on a logarithmic axis."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def save(picture: Figure, file: Path) -> Path:
    """Write a picture without date and version, so that the same picture is the same bytes; return the file."""
    nothing = {"Date": None, "Creator": None} if file.suffix == ".svg" else {"Software": None}
    with applied():
        picture.savefig(file, dpi=192, facecolor="white", metadata=nothing)
    if file.suffix == ".svg":
        file.write_text(_NUMBER.sub(lambda found: f"{float(found[0]):.5g}", file.read_text()))
    return file
