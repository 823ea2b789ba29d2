"""Policies on a recorded routing, without a machine, and the best that any of them could have done."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from fiddler.cache.cache import ExpertCache
from fiddler.cache.keys import Key, Visit
from fiddler.cache.worth import Policy


@dataclass(frozen=True, slots=True)
class Replay:
    """What a trace cost: an expert that a visit needs is one hit or one miss, however many rows it gets."""

    n_hits: int
    n_misses: int
    n_tokens: int

    @property
    def hit_rate(self) -> float:
        """Hits among all; 1 where nothing was needed."""
        n_visits = self.n_hits + self.n_misses
        return self.n_hits / n_visits if n_visits else 1.0

    @property
    def reads_per_token(self) -> float:
        """Experts copied in or read elsewhere, for every token, be it of a prompt or made."""
        return self.n_misses / self.n_tokens if self.n_tokens else 0.0


def replay(
    trace: Iterable[Visit], policy: Policy, n_slots: int, floor: int = 0, *, admission: float | None = None
) -> Replay:
    """Run a trace through a cache that is empty at first.

    A newcomer is refused where its victim is worth more than `admission` times as much: `inf` keeps every miss,
    worth it or not; 1 keeps what is worth most. Unless given, the policy says which of the two it means
    (`Policy.bypasses`). A visit's experts stay until the visit is over; misses that find no slot beside them, or
    are refused, are fetched and not kept.
    """
    if admission is None:
        admission = 1.0 if policy.bypasses else inf
    cache = ExpertCache(n_slots, policy.history.n_experts, policy, floor=floor, admission=admission)
    n_hits = n_visits = 0
    for layer, rows, n_tokens in trace:
        cache.observe(layer, rows, n_tokens)
        keys = [(layer, expert) for expert, _ in rows]
        hits = [key for key in keys if cache.slot(key) is not None]
        n_visits += len(keys)
        n_hits += len(hits)
        for key in hits:
            cache.lease(key)
        for key in [*hits, *_kept(cache, [key for key in keys if key not in hits])]:
            cache.release(key)
    return Replay(n_hits, n_visits - n_hits, policy.history.n_tokens)


def _kept(cache: ExpertCache, missing: list[Key]) -> Iterator[Key]:
    """Copy in and lease whatever of a visit's missing experts may stay, those worth most first."""
    for key in sorted(missing, key=cache.score, reverse=True):
        reservation = cache.reserve(key)
        if reservation is not None:
            cache.landed(reservation)
            cache.lease(key)
            yield key


def belady(trace: Sequence[Visit], n_slots: int) -> Replay:
    """The fewest misses that any policy can have with `n_slots`, knowing the future and starting empty.

    After each visit, keep the experts whose next use is nearest, of those that were there and those just fetched
    (Belady's MIN with bypass). Keeping an expert from one use to its next occupies a slot over an interval, at most
    `n_slots` intervals may overlap, and dropping the one that ends last keeps most of them (Faigle and Nawijn,
    1995); so floors, quotas and forced admission can only add misses.
    """
    upcoming = next_uses(trace)
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


def next_uses(trace: Sequence[Visit]) -> list[list[float]]:
    """For every expert of every visit: the number of the visit that needs it next, or inf."""
    following: dict[Key, float] = {}
    uses: list[list[float]] = []
    for number in range(len(trace) - 1, -1, -1):
        layer, rows, _ = trace[number]
        uses.append([following.get((layer, expert), inf) for expert, _ in rows])
        following.update({(layer, expert): number for expert, _ in rows})
    return uses[::-1]
