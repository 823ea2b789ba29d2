"""Writes a run to a file: all of it as a Chrome trace, or a few layers as a picture."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from fiddler.errors import ConfigError
from fiddler.trace import Decision, Kind, Span, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")
N_LAYERS = 5
"""Layers in a picture of default length."""
_N_TRIED = 64
"""Number of windows that are compared."""
_CHARACTERS = 108
"""Characters of a label that fit across the whole picture."""
_FAINT = 0.45
"""Share of its colour that a second wave keeps."""
_MARGIN = 1.0
"""Margin of a label in its bar, in characters."""
_SIZE = (8.4, 4.4)
"""Size in inches: about as wide as a page shows a picture, so that its letters are not shrunk."""
_N_COLUMNS = 4
"""Columns of the legend."""

_LANES = {"gpu": "GPU", "link": "link", "cpu": "CPU"}
# Okabe and Ito's palette: its colours stay apart under the common colour blindnesses. A hatch tells two yellows.
_LOOKS: Mapping[Kind, tuple[str, str, str]] = {
    "dense": ("dense part", "#BBBBBB", ""),
    "slots": ("experts from slots", "#0072B2", ""),
    "copy": ("demand copy", "#E69F00", ""),
    "ahead": ("copy ahead", "#56B4E9", r"\\\\"),
    "promote": ("promotion", "#F0E442", "////"),
    "cpu": ("experts on the CPU", "#009E73", ""),
}
_WITH_WHITE: frozenset[Kind] = frozenset({"slots", "cpu"})


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a run that a picture shows, in seconds."""

    start_s: float
    end_s: float

    def sees(self, start_s: float, end_s: float) -> bool:
        """Whether something that lasts from `start_s` to `end_s` is partly inside."""
        return start_s < self.end_s and end_s > self.start_s

    def clip_ms(self, start_s: float, end_s: float) -> tuple[float, float]:
        """Return the part of it that is inside, in milliseconds from the window's start."""
        start_s, end_s = max(start_s, self.start_s), min(end_s, self.end_s)
        return (start_s - self.start_s) * 1e3, (end_s - self.start_s) * 1e3

    @property
    def length_ms(self) -> float:
        """Its length in milliseconds."""
        return (self.end_s - self.start_s) * 1e3


def check(file: Path) -> None:
    """Raise `ConfigError` where `write` could not write such a file."""
    if file.suffix not in (".json", *PICTURES):
        raise ConfigError(f"{file}: a timeline is a .json (Chrome trace), or one of {', '.join(PICTURES)}")
    if file.suffix in PICTURES and find_spec("matplotlib") is None:
        raise ConfigError("a picture needs matplotlib: pip install 'fiddler-moe[plot]', or write a .json")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}")


def write(trace: Trace, file: Path, about: Mapping[str, str], *, from_s: float, length_s: float | None) -> None:
    """Write a run: all of it as JSON, or a picture of a window after `from_s`.

    `about` says what was run, the title first. Raises `ConfigError` where the file cannot be written.
    """
    try:
        if file.suffix == ".json":
            file.write_text(json.dumps(trace.chrome(about)), encoding="utf-8")
        else:
            draw(trace, list(about.values()), choose_window(trace, from_s, length_s)).savefig(file, dpi=200)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error}") from error


def choose_window(trace: Trace, from_s: float, length_s: float | None = None) -> Window:
    """Return a window after `from_s` that shows as many kinds of jobs as any; of those, the one in the middle.

    It begins where some layer of a wave is done and the next one's dense part begins. Unless `length_s` is given it
    is `N_LAYERS` layers long, or as many as the model has.
    """
    windows: list[Window] = []
    for decisions in _by_wave(d for d in trace.decisions if d.at_s >= from_s).values():
        ends = [_end_s(d) for d in decisions]
        n_layers = min(N_LAYERS, len(ends) - 1)
        if n_layers:
            windows += [Window(a, b) for a, b in zip(ends, ends[n_layers:], strict=False)]
    if not windows:
        last_s = max((span.end_s for span in trace.spans), default=0.0)
        windows = [Window(from_s if last_s > from_s else 0.0, last_s or 1e-3)]
    if length_s is not None:
        windows = [Window(window.start_s, window.start_s + length_s) for window in windows]
    windows = windows[:: -(-len(windows) // _N_TRIED)]
    kinds = [len({s.kind for s in trace.spans if window.sees(s.start_s, s.end_s)}) for window in windows]
    best = [window for window, n in zip(windows, kinds, strict=True) if n == max(kinds)]
    return best[len(best) // 2]


def _by_wave(decisions: Iterable[Decision]) -> dict[int, list[Decision]]:
    waves: dict[int, list[Decision]] = {}
    for decision in decisions:
        waves.setdefault(decision.wave, []).append(decision)
    return waves


def _end_s(decision: Decision) -> float:
    return decision.at_s + decision.measured_s


def draw(trace: Trace, about: Sequence[str], window: Window) -> "Figure":
    """Return a picture of a window; `about` says what was run, the title first."""
    from matplotlib.figure import Figure

    waves = _by_wave(d for d in trace.decisions if window.sees(d.at_s, _end_s(d)))
    spans = [span for span in trace.spans if window.sees(span.start_s, span.end_s)]
    second = set(_second(waves))
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0.0, window.length_ms)
    axes.set_ylim(-0.5, len(_LANES) - 0.5)
    for span in spans:
        _bar(axes, span, window, faint=span.wave in second)
    for wave, decisions in waves.items():
        _layers(axes, decisions, window, first=wave not in second)
    _frame(axes, window)
    _legend(axes, [kind for kind in _LOOKS if any(span.kind == kind for span in spans)], two=bool(second))
    figure.suptitle(about[0], x=0.01, ha="left", fontsize=13, fontweight="bold")
    lines = [line for text in about[1:] for line in wrap(text, _CHARACTERS)]
    axes.set_title("\n".join(lines), loc="left", fontsize=9, color="#444444", pad=36 if second else 22)
    return figure


def _second(waves: Mapping[int, Sequence[Decision]]) -> Iterator[int]:
    """Yield the waves that travel beside an earlier one."""
    for wave, own in waves.items():
        for other, others in waves.items():
            if other < wave and others[0].at_s < _end_s(own[-1]) and own[0].at_s < _end_s(others[-1]):
                yield wave


def _bar(axes: "Axes", span: Span, window: Window, *, faint: bool) -> None:
    """Draw a job, with a label if there is room for one."""
    _, colour, hatch = _LOOKS[span.kind]
    edge = "#333333"
    if faint:
        colour, edge = _paler(colour), _paler(edge)
    start, end = window.clip_ms(span.start_s, span.end_s)
    row = list(reversed(_LANES)).index(span.lane)
    axes.barh(row, end - start, 0.62, start, color=colour, hatch=hatch, edgecolor=edge, lw=0.5)
    room = (end - start) / window.length_ms * _CHARACTERS
    label = next((label for label in _labels(span) if len(label) + _MARGIN <= room), None)
    if label is not None:
        colour = "white" if span.kind in _WITH_WHITE and not faint else "black"
        under = {"facecolor": "white", "edgecolor": "none", "pad": 1.0} if hatch else None
        axes.text((start + end) / 2, row, label, ha="center", va="center", fontsize=9, color=colour, bbox=under)


def _paler(colour: str) -> str:
    """Return a colour mixed with white, so that no line shines through."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(_FAINT * part + (1 - _FAINT) * 255):02X}" for part in parts)


def _labels(span: Span) -> tuple[str, ...]:
    """Return possible labels of a bar, the best first: numbers of experts, or the one that is copied."""
    if span.kind == "dense":
        return ()
    words = span.name.split()  # "L3 2 experts", "copy L3 E7", "ahead L4 E2"
    if span.kind in ("ahead", "promote"):
        return " ".join(words[1:]), words[2]
    return (words[2],) if span.kind == "copy" else (" ".join(words[1:]), words[1])


def _layers(axes: "Axes", decisions: Sequence[Decision], window: Window, *, first: bool) -> None:
    """Draw a line where each of a wave's layers ends, and number them above; those of a second wave higher up."""
    start_s = window.start_s
    for decision in decisions:
        start, end = window.clip_ms(start_s, _end_s(decision))
        start_s = _end_s(decision)
        label = f"layer {decision.layer}"
        if (end - start) / window.length_ms * _CHARACTERS > len(label):
            axes.annotate(
                label,
                ((start + end) / 2, 1.0),
                (0, 5 if first else 18),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color="black" if first else "#777777",
            )
        axes.axvline(end, color="black" if first else "#777777", lw=0.9, ls="-" if first else ":", zorder=0)


def _frame(axes: "Axes", window: Window) -> None:
    axes.set_yticks(range(len(_LANES)), list(reversed(_LANES.values())), fontsize=11)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"milliseconds, from {window.start_s * 1e3:,.1f} ms of the run on")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(axes: "Axes", kinds: Sequence[Kind], *, two: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = []
    for label, colour, hatch in (_LOOKS[kind] for kind in kinds):
        handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="#333333", linewidth=0.5, label=label))
    handles.append(Line2D([], [], color="black", linewidth=0.9, label="end of a layer"))
    if two:
        handles.append(
            Patch(facecolor="#DDDDDD", edgecolor="#777777", label="the second wave: paler, lines dotted")
        )
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=_N_COLUMNS,
        frameon=False,
        fontsize=9,
    )
