"""How much a little knowledge of the future is worth: a policy that knows the routing of the next tokens."""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from math import inf

from fiddler.cache.aged import AgedCounts
from fiddler.cache.history import History
from fiddler.cache.keys import Key, Visit
from fiddler.cache.replay import Replay, next_uses

HALF_LIFE = 16.0
"""Tokens; of those compared in published replays the aged LFU with this one was best."""

_Use = tuple[Key, float, float, float]
"""An expert as a visit leaves it: (key, visit that needs it next, tokens before that, inflated aged count)."""


class Foresight:
    """A trace prepared for replays that know what comes next.

    At a layer of a step is known which experts the later layers of this step need, and all layers of the steps that
    begin within the next `n_tokens` tokens. As `belady` it keeps what is needed soonest, and need not keep what was
    just fetched. Experts that are not known to be needed count less than any that is, and stand by aged LFU, all
    aged to the same moment; of equals the one touched longest ago goes.

    Guaranteed: never fewer misses than `belady`, and as many once `n_tokens` is beyond every gap between two uses
    of an expert. Not guaranteed: that more foresight never has more misses; guesses beyond it may be lucky.
    """

    def __init__(self, trace: Sequence[Visit], half_life: float = HALF_LIFE) -> None:
        self._visits = list(_uses(trace, half_life))

    def replay(self, n_slots: int, n_tokens: float) -> Replay:
        """Play the trace, starting empty; `n_tokens` may be inf. 0 tokens still are the rest of the step."""
        known: list[tuple[float, int, Key]] = []  # the last needed in front
        guessed: list[tuple[float, int, Key, float, float]] = []  # the least count in front
        kept: dict[Key, int] = {}
        n_hits = n_misses = 0
        for number, (now, uses) in enumerate(self._visits):
            horizon = now + n_tokens
            for key, visit, token, count in uses:
                n_hits += key in kept
                n_misses += key not in kept
                kept[key] = number
                if token < horizon:
                    heappush(known, (-visit, number, key))
                else:
                    heappush(guessed, (count, number, key, visit, token))
            while len(kept) > n_slots:
                _drop(kept, known, guessed, horizon)
        return Replay(n_hits, n_misses, self._visits[-1][0] if self._visits else 0)


def _drop(
    kept: dict[Key, int],
    known: list[tuple[float, int, Key]],
    guessed: list[tuple[float, int, Key, float, float]],
    horizon: float,
) -> None:
    """Drop one expert; on the way, forget entries of those that were used since, and move those now known."""
    while guessed:
        _, number, key, visit, token = heappop(guessed)
        if kept.get(key) != number:
            continue
        if token >= horizon:
            del kept[key]
            return
        heappush(known, (-visit, number, key))
    while True:
        _, number, key = heappop(known)
        if kept.get(key) == number:
            del kept[key]
            return


def _uses(trace: Sequence[Visit], half_life: float) -> Iterator[tuple[int, list[_Use]]]:
    """Yield for every visit the tokens that have begun by then, and what it used."""
    history = History(_n_experts(trace))
    counts = AgedCounts(history, half_life)
    before: dict[float, float] = {inf: inf}
    clocks = [0] * len(history.n_experts)
    for number, (layer, _, n_tokens) in enumerate(trace):
        before[number] = clocks[layer]
        clocks[layer] += n_tokens
    now = 0
    for (layer, rows, n_tokens), nexts in zip(trace, next_uses(trace), strict=True):
        history.observe(layer, rows, n_tokens)
        counts.observe(layer, rows, n_tokens)
        keys = [(layer, expert) for expert, _ in rows]
        used = [(key, n, before[n], counts.inflated(key)) for key, n in zip(keys, nexts, strict=True)]
        now = max(now, history.layer_tokens(layer))
        yield now, used


def _n_experts(trace: Sequence[Visit]) -> tuple[int, ...]:
    """How many there are at least, by layer."""
    most: dict[int, int] = {}
    for layer, rows, _ in trace:
        most[layer] = max(most.get(layer, 0), *(expert + 1 for expert, _ in rows), 0)
    return tuple(most.get(layer, 0) for layer in range(max(most, default=-1) + 1))
