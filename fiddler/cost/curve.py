"""Seconds as a function of rows."""

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self


@dataclass(frozen=True, slots=True)
class Curve:
    """Piecewise linear through `(rows, seconds)` points, rows ascending.

    Below the first point it is flat, for an expert's weights are read whole however few rows visit; above the last
    it goes on at the slope of the last piece. Raises `ValueError` for no points, or rows not ascending.
    """

    points: tuple[tuple[float, float], ...]
    _known: dict[float, float] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        rows = [n for n, _ in self.points]
        if not rows or any(a >= b for a, b in pairwise(rows)):
            raise ValueError("a curve needs points with ascending row counts")

    @classmethod
    def roofline(cls, fixed_s: float, read_s: float, row_s: float) -> Self:
        """Return `fixed + max(read, n·row)`: a dispatch, then the weights' bytes or the arithmetic, the longer.

        Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
        """
        if row_s <= 0.0:
            return cls(((1.0, fixed_s + read_s),))
        knee = max(read_s / row_s, 1.0)
        first = fixed_s + max(read_s, row_s)
        last = (2 * knee, fixed_s + 2 * knee * row_s)
        return cls(((1.0, first), last) if knee == 1.0 else ((1.0, first), (knee, first), last))

    def __call__(self, n: float) -> float:
        """Return the seconds of `n` rows; 0.0 for none."""
        seconds = self._known.get(n)
        if seconds is None:
            seconds = self._known[n] = self._at(n) if n > 0 else 0.0
        return seconds

    def _at(self, n: float) -> float:
        points = self.points
        i = bisect_left(points, n, key=lambda point: point[0])
        if i == 0 or len(points) == 1:
            return points[0][1]
        (n0, s0), (n1, s1) = points[i - 1 : i + 1] if i < len(points) else points[-2:]
        return s0 + (n - n0) * (s1 - s0) / (n1 - n0)

    def scaled(self, factor: float) -> "Curve":
        """Return the curve with every time multiplied."""
        return Curve(tuple((n, s * factor) for n, s in self.points))


NO_TIME = Curve(((1.0, 0.0),))
"""Of what takes none."""
