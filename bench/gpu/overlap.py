"""What a recorded run says of its lanes: how long they worked side by side, how right plans were, who waited."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from statistics import median, quantiles
from typing import Any

from fiddler.cost.lanes import LANES
from fiddler.trace import Decision, Span, Trace

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return intervals that cover the same and do not touch, in order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        elif end > start:
            joined.append((start, end))
    return joined


def both(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Return where both are; each as `union` returns it."""
    found, i, k = list[Interval](), 0, 0
    while i < len(one) and k < len(other):
        start, end = max(one[i][0], other[k][0]), min(one[i][1], other[k][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[k][1]:
            i += 1
        else:
            k += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Return the seconds of intervals that do not touch."""
    return sum(end - start for start, end in intervals)


def since(trace: Trace, start_s: float) -> Trace:
    """Return what of a run began at `start_s` or later, in seconds from there."""
    spans = [replace(s, start_s=s.start_s - start_s, end_s=s.end_s - start_s) for s in trace.spans]
    decisions = [replace(d, at_s=d.at_s - start_s) for d in trace.decisions]
    later = [s for s in spans if s.start_s >= 0.0], [d for d in decisions if d.at_s >= 0.0]
    return Trace(spans=later[0], decisions=later[1])


def decoding(trace: Trace, n_before: int, top_k: int) -> Trace:
    """Return the decoding of one sequence, which comes after `n_before` decisions and the prompt's.

    Its layers have at most `top_k` visits. Raises `RuntimeError` where no layer was decided, as where every expert
    is in a slot and the host is not asked.
    """
    made = [d for d in trace.decisions[n_before:] if d.n_rows <= top_k]
    if not made:
        raise RuntimeError("no layer of a decoding step was decided")
    found = since(trace, made[0].at_s)
    return Trace(spans=found.spans, decisions=[d for d in found.decisions if d.n_rows <= top_k])


def lanes(trace: Trace) -> dict[str, Any]:
    """Return each lane's seconds of work, and those in which two, or all, worked at the same time."""
    busy = {lane: union((s.start_s, s.end_s) for s in trace.spans if s.lane == lane) for lane in LANES}
    together = {f"{a} and {b}": length(both(busy[a], busy[b])) for a, b in combinations(busy, 2)}
    first, *others = busy.values()
    for other in others:
        first = both(first, other)
    every = union(interval for own in busy.values() for interval in own)
    wall_s = max((end for _, end in every), default=0.0) - min((start for start, _ in every), default=0.0)
    return {
        "wall_s": wall_s,
        "busy_s": {lane: length(own) for lane, own in busy.items()},
        "overlap_s": {**together, "all": length(first)},
        "nobody_s": wall_s - length(every),
    }


def prediction(decisions: Sequence[Decision]) -> dict[str, Any]:
    """Return how far predicted makespans were off: `|predicted / measured - 1|`. Raises `ValueError` for none."""
    errors = sorted(abs(d.predicted_s / d.measured_s - 1.0) for d in decisions if d.measured_s > 0.0)
    if not errors:
        raise ValueError("no layer was decided")
    p90 = quantiles(errors, n=10, method="inclusive")[-1] if len(errors) > 1 else errors[0]
    return {"n_layers": len(errors), "median": median(errors), "p90": p90}


def gaps(trace: Trace) -> list[float]:
    """Return the seconds that the main stream rested between a dense part's end and the experts queued behind it.

    Of layers that had experts in slots and waited for no copy; a wave's first layer has no dense part on record.
    """
    waits = {(d.wave, d.layer) for d in trace.decisions if d.n_fetch}
    found = list[float]()
    by_wave: dict[int | None, list[Span]] = {}
    for span in trace.spans:
        if span.lane == "gpu":
            by_wave.setdefault(span.wave, []).append(span)
    for wave, spans in by_wave.items():
        for dense, slots in pairwise(sorted(spans, key=lambda span: span.start_s)):
            if dense.kind == "dense" and slots.kind == "slots" and (wave, slots.layer) not in waits:
                found.append(slots.start_s - dense.end_s)
    return found


def layers(decisions: Sequence[Decision]) -> list[float]:
    """Return, by wave, the host's seconds from one layer's decision to the next one's, the mean over its layers."""
    by_wave: dict[int, list[float]] = {}
    for decision in decisions:
        by_wave.setdefault(decision.wave, []).append(decision.at_s)
    return [(max(own) - min(own)) / (len(own) - 1) for own in by_wave.values() if len(own) > 1]
