"""What must be true, beside what was found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.gpu.context import Context
from bench.report import table

OURS = "fiddler"
Part = Mapping[str, Any]
"""What a part has found; empty for one that did not run."""
Cells = Iterator[tuple[float, str]]
"""Values, each with where it was found."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One thing that must be true; of many cells the worst one decides."""

    part: str
    claim: str
    bound: float
    cells: Callable[[Part], Cells]
    at_least: bool = True
    shown: str = ".2f"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal, and what was found, in words."""

    claim: str
    goal: str
    found: str
    value: float | None
    met: bool | None
    """`None` where it was not measured."""


def verdict(goal: Goal, found: Part) -> Verdict:
    """Hold a goal against what its part has found."""
    cells = list(goal.cells(found))
    wanted = f"at {'least' if goal.at_least else 'most'} {goal.bound:{goal.shown}}"
    if not cells:
        return Verdict(goal.claim, wanted, "", None, None)
    good = [value >= goal.bound if goal.at_least else value <= goal.bound for value, _ in cells]
    value, where = (min if goal.at_least else max)(cells)
    said = f"{value:{goal.shown}} ({where}); {sum(good)} of {len(good)} meet it"
    return Verdict(goal.claim, wanted, said, value, all(good))


def verdicts(parts: Mapping[str, Part | None]) -> list[Verdict]:
    """Return every verdict."""
    return [verdict(goal, parts.get(goal.part) or {}) for goal in GOALS]


def summary(ctx: Context) -> dict[str, Any]:
    """Print the table, and return it."""
    found = verdicts({goal.part: ctx.known(goal.part) for goal in GOALS})
    print(render(found), flush=True)
    return {"verdicts": [asdict(one) for one in found]}


def render(found: Sequence[Verdict]) -> str:
    """Return the verdicts as text."""
    said = {True: "met", False: "NOT met", None: "not measured"}
    rows = [(v.claim, v.goal, v.found, said[v.met]) for v in found]
    return table("What must be true", ("", "goal", "found, the worst", ""), rows)


def _place(row: Part) -> str:
    n = row["n_sequences"]
    return f"{row['model']}, {row['budget_gib']:g} GiB, {n} sequence{'s' * (n > 1)}"


def _of_bound(decode: Part) -> Cells:
    for row in decode.get("decode", ()):
        if row["system"] == OURS and row["of_bound"] is not None:
            yield row["of_bound"]["median"], _place(row)


def _over_best(decode: Part) -> Cells:
    """Yield how many times as fast ours is as the best other system, for each place with both."""
    places: dict[str, dict[str, float]] = {}
    for row in decode.get("decode", ()):
        places.setdefault(_place(row), {})[row["system"]] = row["tokens_per_s"]["median"]
    for place, speeds in places.items():
        ours = speeds.pop(OURS, None)
        if ours is not None and speeds:
            best = max(speeds, key=lambda name: speeds[name])
            yield ours / speeds[best], f"{place}, {best} is next"


def _of_run(name: str, *keys: str) -> Callable[[Part], Cells]:
    def cells(timeline: Part) -> Cells:
        value: Any = timeline.get("run") or {}
        for key in keys:
            value = value.get(key) if value is not None else None
        if value is not None:
            yield value, name

    return cells


def _resident(resident: Part) -> Cells:
    for row in resident.get("rows", ()):
        if row["over_best"] is not None:
            yield row["over_best"], f"{resident['model']}, {row['n_sequences']} sequences"


_PREDICTED, _IDLE = _of_run("predicted", "prediction", "median"), _of_run("one sequence", "nobody_s_a_layer")
GOALS = (
    Goal("decode", "decoding, share of the physical bound", 0.80, _of_bound),
    Goal("decode", "decoding, times the best other system", 1.30, _over_best),
    Goal("timeline", "makespans, median error", 0.15, _PREDICTED, at_least=False),
    Goal("timeline", "seconds of a layer in which nothing works", 60e-6, _IDLE, at_least=False, shown=".2g"),
    Goal("resident", "a model that fits, times transformers", 1.0, _resident),
)
