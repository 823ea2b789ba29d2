"""Policies on a recorded routing, without a machine, and the best that any of them could have done."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from fiddler.cache.cache import ExpertCache
from fiddler.cache.keys import Key, Rows
from fiddler.cache.worth import Policy

Visit = tuple[int, Rows, int]
"""One layer of one step: (layer, ((expert, n_rows), …), n_tokens)."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a trace cost: an expert that a visit needs is one hit or one miss, however many rows it gets."""

    n_hits: int
    n_misses: int
    n_tokens: int


def replay(trace: Iterable[Visit], policy: Policy, n_slots: int, floor: int = 0) -> Replay:
    """Run a trace through a cache that is empty at first; every miss is fetched, worth it or not.

    A visit's experts stay until the visit is over; misses that find no slot beside them are fetched and not kept.
    """
    # no score can refuse a newcomer under infinite admission
    cache = ExpertCache(n_slots, policy.history.n_experts, policy, floor=floor, admission=inf)
    n_hits = n_misses = 0
    for layer, rows, n_tokens in trace:
        cache.observe(layer, rows, n_tokens)
        keys = [(layer, expert) for expert, _ in rows]
        leased = [key for key in keys if cache.slot(key) is not None]
        missing = [key for key in keys if cache.slot(key) is None]
        n_hits += len(leased)
        n_misses += len(missing)
        for key in leased:
            cache.lease(key)
        for key in missing:
            if reservation := cache.reserve(key):
                cache.landed(reservation)
                cache.lease(key)
                leased.append(key)
        for key in leased:
            cache.release(key)
    return Replay(n_hits, n_misses, policy.history.n_tokens)


def belady(trace: Sequence[Visit], n_slots: int) -> Replay:
    """The fewest misses that any policy can have with `n_slots`, knowing the future and starting empty.

    After each visit, keep the experts whose next use is nearest, of those that were there and those just fetched
    (Belady's MIN with bypass). Keeping an expert from one use to its next occupies a slot over an interval, at most
    `n_slots` intervals may overlap, and dropping the one that ends last keeps most of them (Faigle and Nawijn,
    1995); so floors, quotas and forced admission can only add misses.
    """
    upcoming = _next_uses(trace)
    clocks: dict[int, int] = {}
    kept: dict[Key, float] = {}
    farthest: list[tuple[float, Key]] = []
    n_hits = n_misses = 0
    for (layer, rows, n_tokens), nexts in zip(trace, upcoming, strict=True):
        clocks[layer] = clocks.get(layer, 0) + n_tokens
        for (expert, _), use in zip(rows, nexts, strict=True):
            key = (layer, expert)
            n_hits += key in kept
            n_misses += key not in kept
            kept[key] = use
            heappush(farthest, (-use, key))
        while len(kept) > n_slots:
            use, key = heappop(farthest)
            if kept.get(key) == -use:  # else it was used since, and stands elsewhere in the heap
                del kept[key]
    return Replay(n_hits, n_misses, max(clocks.values(), default=0))


def _next_uses(trace: Sequence[Visit]) -> list[list[float]]:
    """For every expert of every visit: the number of the visit that needs it next, or inf."""
    following: dict[Key, float] = {}
    uses: list[list[float]] = []
    for number in range(len(trace) - 1, -1, -1):
        layer, rows, _ = trace[number]
        uses.append([following.get((layer, expert), inf) for expert, _ in rows])
        following.update({(layer, expert): number for expert, _ in rows})
    return uses[::-1]
