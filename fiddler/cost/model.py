"""The calibrated cost model: seconds of an expert on the CPU, on the GPU and on the link, and of the dense part.

`Curve` gives seconds as a function of rows. `Correction` compares the lanes' reports with predictions, and corrects
the model while it is used.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from operator import itemgetter
from typing import Any, Literal, Self

from fiddler.given import real_number, shown

LaneName = Literal["cpu", "gpu", "link"]
LANES: tuple[LaneName, ...] = ("cpu", "gpu", "link")

_rows = itemgetter(0)


class _Times(dict[float, float]):
    """Seconds by rows, each worked out when it is first asked for."""

    points: tuple[tuple[float, float], ...]

    def __missing__(self, n: float) -> float:
        seconds = self[n] = self._between(n) if n > 0 else 0.0
        return seconds

    def _between(self, n: float) -> float:
        points = self.points
        i = bisect_left(points, n, key=_rows)
        if i == 0 or len(points) == 1:
            return points[0][1]
        (n0, s0), (n1, s1) = points[i - 1 : i + 1] if i < len(points) else points[-2:]
        return s0 + (n - n0) * (s1 - s0) / (n1 - n0)


@dataclass(frozen=True, slots=True)
class Curve:
    """Piecewise linear through `(rows, seconds)` points, rows ascending.

    Below the first point it is flat, for an expert's weights are read whole however few rows visit; above the last
    it goes on at the slope of the last piece. Raises `ValueError` for no points, or rows not ascending.
    """

    points: tuple[tuple[float, float], ...]
    at: "_Times" = field(init=False, compare=False, repr=False)
    """Seconds by rows, as a call returns them, for who asks often."""

    def __post_init__(self) -> None:
        last = -inf
        for n, _ in self.points:
            if n <= last:
                raise ValueError("a curve needs points with ascending row counts")
            last = n
        if not self.points:
            raise ValueError("a curve needs points with ascending row counts")
        object.__setattr__(self, "at", _Times())
        self.at.points = self.points

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
        return self.at[n]

    def scaled(self, factor: float) -> "Curve":
        """Return the curve with every time multiplied."""
        return Curve(tuple([(n, s * factor) for n, s in self.points]))


NO_TIME = Curve(((1.0, 0.0),))
"""The curve of work that takes no time."""


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """One expert's costs; experts of one shape share them. Seconds, with nothing else running."""

    cpu: Curve
    gpu: Curve
    copy_s: float
    """Seconds to copy one block over the link."""
    nbytes: int
    """Bytes of the block."""


@dataclass(frozen=True, slots=True)
class Contention:
    """How much the CPU lane and the link slow each other, since both read the same host memory.

    Factors of at least 1 on the seconds either takes alone, for as long as both are busy.
    """

    cpu: float = 1.0
    link: float = 1.0


@dataclass(frozen=True, slots=True)
class Moves:
    """Activations to the CPU and back, for a layer with any expert there: `fixed_s + row_s · rows`."""

    fixed_s: float = 0.0
    row_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Dense:
    """The part of the model that is not experts, per layer: attention, norms, router, shared experts.

    `rows` is the seconds of a layer's dense part by rows of a wave; `context_s` is added per token of context that
    the wave's sequences attend to, all of them together; `head` is the output head, by rows, at a step's end.
    """

    rows: Curve
    context_s: float = 0.0
    head: Curve = NO_TIME

    def layer_s(self, n_rows: int, n_context: int) -> float:
        """Return the seconds of one layer's dense part."""
        return self.rows(n_rows) + self.context_s * n_context


NO_CONTENTION = Contention()
_NO_MOVES = Moves()
_NO_DENSE = Dense(NO_TIME)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Everything the plan knows about time. `experts` is by layer."""

    experts: tuple[ExpertCosts, ...]
    contention: Contention = NO_CONTENTION
    moves: Moves = _NO_MOVES
    dense: Dense = _NO_DENSE
    host_s: float = 0.0
    """Seconds of the host's own work per layer of a wave: launches and the scheduler."""

    def cpu_s(self, layer: int, rows: Sequence[int]) -> float:
        """Return the CPU lane's seconds for experts with `rows` rows each, activation moves included."""
        if not rows:
            return 0.0
        at, row_s = self.experts[layer].cpu.at, self.moves.row_s
        seconds = 0.0
        for n in rows:
            seconds += at[n] + row_s * n
        return self.moves.fixed_s + seconds

    def gpu_s(self, layer: int, rows: Sequence[int]) -> float:
        """Return the GPU lane's seconds for experts with `rows` rows each."""
        at = self.experts[layer].gpu.at
        seconds = 0.0
        for n in rows:
            seconds += at[n]
        return seconds

    def as_json(self) -> dict[str, Any]:
        """Return a JSON value that `from_json` reads back."""
        shapes = list(dict.fromkeys(self.experts))
        return {
            "shapes": [
                {"cpu": e.cpu.points, "gpu": e.gpu.points, "copy_s": e.copy_s, "nbytes": e.nbytes} for e in shapes
            ],
            "layers": [shapes.index(e) for e in self.experts],
            "contention": {"cpu": self.contention.cpu, "link": self.contention.link},
            "moves": {"fixed_s": self.moves.fixed_s, "row_s": self.moves.row_s},
            "dense": {
                "rows": self.dense.rows.points,
                "context_s": self.dense.context_s,
                "head": self.dense.head.points,
            },
            "host_s": self.host_s,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read the value of `as_json`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        shapes = [
            ExpertCosts(_curve(s["cpu"]), _curve(s["gpu"]), _number(s["copy_s"]), int(_number(s["nbytes"])))
            for s in value["shapes"]
        ]
        dense = value["dense"]
        return cls(
            experts=tuple(shapes[i] for i in value["layers"]),
            contention=Contention(**_numbers(value["contention"], least=1.0)),
            moves=Moves(**_numbers(value["moves"])),
            dense=Dense(_curve(dense["rows"]), _number(dense["context_s"]), _curve(dense["head"])),
            host_s=_number(value["host_s"]),
        )


def _curve(points: Sequence[Sequence[float]]) -> Curve:
    return Curve(tuple((_number(n), _number(s)) for n, s in points))


def _numbers(fields: Mapping[str, Any], least: float = 0.0) -> dict[str, float]:
    return {name: _number(value, least) for name, value in dict(fields).items()}


def _number(value: Any, least: float = 0.0) -> float:
    number = real_number(value)
    if number is None or not least <= number < inf:
        raise ValueError(f"{shown(value)} is no cost")
    return number


def no_costs(n_layers: int) -> CostModel:
    """Return a model that knows nothing: for a machine where there is nothing to choose."""
    return CostModel(experts=(ExpertCosts(NO_TIME, NO_TIME, 0.0, 0),) * n_layers)


WEIGHT = 0.05
"""Weight of one report: about twenty reports decide, so one interrupted job changes little."""
TOLERANCE = 0.05
"""The model is rebuilt only where a factor moved by more; a plan sees no difference below."""
LIMITS = 0.2, 5.0
"""A report outside these limits comes from a machine that slept, and is ignored."""


class Correction:
    """Owner of the cost model in use: the calibrated one with a factor a lane."""

    def __init__(self, calibrated: CostModel) -> None:
        self._calibrated = calibrated
        self._shapes = list(dict.fromkeys(calibrated.experts))
        self._which = [self._shapes.index(expert) for expert in calibrated.experts]
        self._factors: dict[LaneName, float] = {"cpu": 1.0, "gpu": 1.0, "link": 1.0}
        self._applied = dict(self._factors)
        self.costs = calibrated
        """The model to plan with."""

    @property
    def factors(self) -> dict[LaneName, float]:
        """Recent times as multiples of the calibrated ones, by lane."""
        return dict(self._factors)

    def report(self, lane: LaneName, predicted_s: float, took_s: float) -> None:
        """Take in the time of an expert job or a copy; `costs` made its prediction, including contention.

        Reports of a lane without calibration are ignored, since nothing is predicted for it.
        """
        if not (predicted_s > 0.0 and took_s >= 0.0):
            return
        ratio, applied, factor = took_s / predicted_s, self._applied[lane], self._factors[lane]
        if not LIMITS[0] <= ratio <= LIMITS[1]:
            ratio = LIMITS[0] if ratio < LIMITS[0] else LIMITS[1]
        factor += WEIGHT * (ratio * applied - factor)
        self._factors[lane] = factor
        if not -TOLERANCE <= factor / applied - 1.0 <= TOLERANCE:
            self._applied = dict(self._factors)
            self.costs = replace(self._calibrated, experts=self._corrected())

    def _corrected(self) -> tuple[ExpertCosts, ...]:
        by = self._applied
        made = [
            ExpertCosts(e.cpu.scaled(by["cpu"]), e.gpu.scaled(by["gpu"]), e.copy_s * by["link"], e.nbytes)
            for e in self._shapes
        ]
        return tuple([made[i] for i in self._which])
