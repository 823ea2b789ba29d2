"""The loop that all peers share which are fed their tokens."""

from collections.abc import Callable
from time import perf_counter

from bench.contest.workload import Run

Picks = list[int]
"""The token that the peer would have next, by sequence."""


def timed(prompt: Callable[[], Picks], step: Callable[[int], Picks], n_output: int, patience_s: float) -> Run:
    """Run `prompt`, then `step(i)` with the i-th of the tokens that were made, and time both.

    Stops after `n_output` picks, or once steps have taken `patience_s`. The first step is run whatever the
    patience: without it there is no rate.
    """
    picks, first_token_s = _timed(prompt)
    made = [picks]
    decode_s = 0.0
    while len(made) < n_output and (len(made) == 1 or decode_s < patience_s):
        picks, step_s = _timed(lambda: step(len(made) - 1))
        made.append(picks)
        decode_s += step_s
    return Run(first_token_s, decode_s, len(picks), len(made), tuple(zip(*made, strict=True)))


def _timed(work: Callable[[], Picks]) -> tuple[Picks, float]:
    started = perf_counter()
    picks = work()
    return picks, perf_counter() - started
