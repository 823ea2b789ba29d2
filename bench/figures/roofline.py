"""Experts on the CPU under their roofs: how near to memory and matrix units each row count comes, measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import atan, degrees
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures import sources, style
from bench.report import Record

LOOKS = ((style.GREEN, "o"), (style.BLUE, "s"), (style.PURPLE, "^"))
"""Colour and marker, by shape."""
AIR = 1.5
"""Around what is shown, as a factor."""
ABOVE = 1.05
"""Where a roof's name stands, as a factor."""


@dataclass(frozen=True, slots=True)
class Roof:
    """What the machine allows, in GFLOP/s."""

    gbs: float
    """Of reading memory."""
    gflops: float | None
    """Of a large matmul, where it was measured."""

    @classmethod
    def of(cls, report: Record) -> "Roof":
        """Return the roof that a report of `bench.kernels` gives."""
        gemm = report.get("gemm_flop_per_s")
        return cls(report.read_ceiling_gbs, None if gemm is None else gemm.high / 1e9)

    def at(self, n_rows: float) -> float:
        """Return what it allows an expert of `n_rows` rows."""
        by_memory = self.gbs * n_rows
        return by_memory if self.gflops is None else min(by_memory, self.gflops)


def draw() -> Figure:
    """Return the picture of the committed measurement."""
    return picture(sources.measured("kernels"))


def picture(report: Record) -> Figure:
    """Return the picture of a report of `bench.kernels`.

    A row costs 2 operations a weight, and a bfloat16 weight, read once, is 2 bytes: an expert's FLOP/byte are its
    rows, and its GFLOP/s are rows times the GB/s of weights.
    """
    lines = (
        f"{sources.measured_on(report)}.",
        "Whole SwiGLU experts in bfloat16, read from memory, not from a cache; medians, bars from low to high.",
    )
    figure = style.figure(4.6, "Experts on the CPU under the machine's roofs", lines)
    attained, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    roof, shapes = Roof.of(report), by_shape(report)
    for axes in (attained, shares):
        _rows(axes, sorted({n for speeds in shapes.values() for n in speeds}))
    for (name, speeds), (colour, marker) in zip(shapes.items(), LOOKS, strict=False):
        _line(attained, speeds, dict.fromkeys(speeds, 1.0), color=colour, marker=marker, label=name)
        _line(shares, speeds, {n: roof.at(n) / 100.0 for n in speeds}, color=colour, marker=marker)
    _attained(attained, roof)
    shares.axhline(100.0, color=style.BOUND, lw=2)
    shares.set_ylim(0.0, 105.0)
    shares.set_ylabel("% of the roof")
    return figure


def by_shape(report: Record) -> dict[str, dict[int, dict[str, float]]]:
    """Return the spread of GFLOP/s by rows, by the name of the model that has such experts."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for model, shape in report.settings.shapes.items():
        own = [rate for rate in report.experts if [rate.hidden, rate.intermediate] == shape]
        speeds = {rate.n_rows: {name: rate.n_rows * gbs for name, gbs in rate.gbs.items()} for rate in own}
        found[f"{model} {shape}"] = dict(sorted(speeds.items()))
    return found


def _rows(axes: Axes, rows: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(rows[0] / AIR, rows[-1] * AIR)
    style.log_ticks(axes.xaxis, rows)
    axes.set_xlabel("rows of an expert = FLOP per byte of weights")
    axes.grid()


def _line(axes: Axes, speeds: Mapping[int, Mapping[str, float]], units: Mapping[int, float], **look: Any) -> None:
    """Draw speeds by rows, each in a unit of its own."""
    middle, low, high = ([s[name] / units[n] for n, s in speeds.items()] for name in ("median", "low", "high"))
    below, above = ([abs(a - b) for a, b in zip(middle, ends, strict=True)] for ends in (low, high))
    axes.errorbar([*speeds], middle, (below, above), ms=6, lw=1.5, capsize=3, **look)


def _attained(axes: Axes, roof: Roof) -> None:
    """Draw what memory allows, and what the matrix units do, over what was attained."""
    first, last = axes.get_xlim()
    low, high = axes.dataLim.y0 / AIR, roof.at(last) * AIR
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    style.log_ticks(axes.yaxis, style.round_numbers(low, high))
    axes.set_ylabel("GFLOP/s")
    ridge = last if roof.gflops is None else min(last, roof.gflops / roof.gbs)
    axes.plot([first, ridge], [roof.at(first), roof.at(ridge)], color=style.BOUND, lw=2)
    slope = {"rotation": degrees(atan(roof.gbs)), "rotation_mode": "anchor", "transform_rotates_text": True}
    where = {"x": first * AIR, "va": "bottom"}
    axes.text(y=roof.at(first * AIR) * ABOVE, s=f"memory: {roof.gbs:.1f} GB/s", color=style.BOUND, **where, **slope)
    if roof.gflops is not None:
        axes.axhline(roof.gflops, color=style.BLACK, lw=2, ls="--")
        axes.text(y=roof.gflops * ABOVE, s=f"large matmul: {roof.gflops:,.0f} GFLOP/s", **where)
    axes.legend(title="expert [hidden, intermediate]", title_fontsize=style.SMALL, loc="lower right")
