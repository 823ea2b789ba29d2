"""What must be true, beside what was found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.gpu.context import Context
from bench.report import table

OURS = "fiddler"
OF_BOUND, OVER_BEST, PREDICTION, OVERHEAD_S, OVER_TRANSFORMERS = 0.80, 1.30, 0.15, 60e-6, 1.0
"""What must be reached, or must not be passed."""
Parts = Mapping[str, Mapping[str, Any] | None]
"""What each part has found; `None` or absent for one that did not run."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that must be true."""

    claim: str
    goal: str
    found: str
    """In words, with where it was worst."""
    value: float | None
    met: bool | None
    """`None` where it was not measured."""


def verdicts(parts: Parts) -> list[Verdict]:
    """Return every verdict; where a claim is of many cells, the worst one decides."""
    return [judge(parts.get(name) or {}) for name, judge in _JUDGES]


def summary(ctx: Context) -> dict[str, Any]:
    """Print the table, and return it."""
    found = verdicts({name: ctx.known(name) for name, _ in _JUDGES})
    print(render(found), flush=True)
    return {"verdicts": [asdict(verdict) for verdict in found]}


def render(found: Sequence[Verdict]) -> str:
    """Return the verdicts as text."""
    said = {True: "met", False: "NOT met", None: "not measured"}
    rows = [(v.claim, v.goal, v.found, said[v.met]) for v in found]
    return table("What must be true", ("", "goal", "found, the worst", ""), rows)


def over_best(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, str]]:
    """Yield how many times as fast ours is as the best other system, and where, for each place with both."""
    places = dict.fromkeys((row["model"], row["budget_gib"], row["n_sequences"]) for row in rows)
    for place in places:
        here = {
            row["system"]: row["tokens_per_s"]["median"]
            for row in rows
            if (row["model"], row["budget_gib"], row["n_sequences"]) == place
        }
        ours = here.pop(OURS, None)
        if ours is not None and here:
            best = max(here, key=lambda name: here[name])
            yield ours / here[best], f"{_where(place)}, {best} is next"


def _where(place: tuple[str, float, int]) -> str:
    model, budget, n = place
    return f"{model}, {budget:g} GiB, {n} sequence{'s' * (n > 1)}"


def _of_bound(decode: Mapping[str, Any]) -> Verdict:
    cells = [
        (row["of_bound"]["median"], _where((row["model"], row["budget_gib"], row["n_sequences"])))
        for row in decode.get("decode", ())
        if row["system"] == OURS and row["of_bound"] is not None
    ]
    return _least("decoding, share of the physical bound", OF_BOUND, cells)


def _over_best(decode: Mapping[str, Any]) -> Verdict:
    llama = decode.get("llama") or {}
    cells = list(over_best([*decode.get("decode", ()), *llama.get("rows", ())]))
    return _least("decoding, times the best other system", OVER_BEST, cells)


def _prediction(timeline: Mapping[str, Any]) -> Verdict:
    error = ((timeline.get("run") or {}).get("prediction") or {}).get("median")
    claim, goal = "predicted makespans, median error", f"at most {PREDICTION:.0%}"
    return Verdict(claim, goal, "" if error is None else f"{error:.1%}", error, _at_most(error, PREDICTION))


def _overhead(timeline: Mapping[str, Any]) -> Verdict:
    seconds = (timeline.get("run") or {}).get("nobody_s_a_layer")
    claim, goal = "seconds of a layer in which nothing works", f"at most {OVERHEAD_S * 1e6:.0f} us"
    found = "" if seconds is None else f"{seconds * 1e6:.1f} us"
    return Verdict(claim, goal, found, seconds, _at_most(seconds, OVERHEAD_S))


def _resident(resident: Mapping[str, Any]) -> Verdict:
    cells = [
        (row["over_best"], f"{resident['model']}, {row['n_sequences']} sequences")
        for row in resident.get("rows", ())
        if row["over_best"] is not None
    ]
    return _least("a model that fits, times transformers", OVER_TRANSFORMERS, cells)


def _tests(checks: Mapping[str, Any]) -> Verdict:
    found, claim, goal = checks.get("tests") or {}, "tests on this GPU", "all pass"
    if found.get("tests") is None:
        return Verdict(claim, goal, str(found.get("says", "")), None, None)
    n_failed = found["failures"] + found["errors"]
    says = f"{n_failed} of {found['tests']} failed, {found['skipped']} skipped"
    # Tests that were all skipped have shown nothing.
    met = None if found["tests"] <= found["skipped"] else not n_failed and found["exit_code"] == 0
    return Verdict(claim, goal, says, float(n_failed), met)


def _least(claim: str, goal: float, cells: Sequence[tuple[float, str]]) -> Verdict:
    if not cells:
        return Verdict(claim, f"at least {goal:.2f}", "", None, None)
    value, where = min(cells)
    n_met = sum(cell[0] >= goal for cell in cells)
    says = f"{value:.2f} ({where}); {n_met} of {len(cells)} meet it"
    return Verdict(claim, f"at least {goal:.2f}", says, value, value >= goal)


def _at_most(value: float | None, goal: float) -> bool | None:
    return None if value is None else value <= goal


_JUDGES: tuple[tuple[str, Callable[[Mapping[str, Any]], Verdict]], ...] = (
    ("checks", _tests),
    ("decode", _of_bound),
    ("decode", _over_best),
    ("timeline", _prediction),
    ("timeline", _overhead),
    ("resident", _resident),
)
