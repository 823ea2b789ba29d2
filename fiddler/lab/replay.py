"""Replays a routing through cache policies without a machine, beside the best that any policy could do.

`belady` gives the fewest misses possible. `Foresight` is a policy that knows the routing of the next tokens, and so
shows how much a little knowledge of the future is worth. `compare` runs policies side by side on several cache
sizes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policies import AgedLfu
from fiddler.cache.policy import History, Key, Policy, Visit


@dataclass(frozen=True, slots=True)
class Replay:
    """Misses and hits of a replay: an expert that a visit needs is one of either, however many rows it gets."""

    n_hits: int
    n_misses: int
    n_tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of hits; 1 where nothing was needed."""
        n_visits = self.n_hits + self.n_misses
        return self.n_hits / n_visits if n_visits else 1.0

    @property
    def reads_per_token(self) -> float:
        """Experts copied in or read elsewhere per token, of prompts and completions."""
        return self.n_misses / self.n_tokens if self.n_tokens else 0.0


def replay(
    trace: Iterable[Visit], policy: Policy, n_slots: int, floor: int = 0, *, admission: float | None = None
) -> Replay:
    """Run a trace through a cache that is empty at first.

    A newcomer is refused where its victim is worth more than `admission` times as much: `inf` keeps every miss,
    worth it or not; 1 keeps the experts that are worth most. Unless given, the policy says which of the two it
    means (`Policy.bypasses`). A visit's experts stay until the visit is over; misses that find no slot beside them,
    or are refused, are fetched and not kept.
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
    """Copy in and lease those of a visit's missing experts that may stay, highest worth first; returns them."""
    for key in sorted(missing, key=cache.score, reverse=True):
        reservation = cache.reserve(key)
        if reservation is not None:
            cache.landed(reservation)
            cache.lease(key)
            yield key


def belady(trace: Sequence[Visit], n_slots: int) -> Replay:
    """Return the fewest misses that any policy can have with `n_slots`, knowing the future and starting empty.

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
    """Return for every expert of every visit the number of the visit that needs it next, or inf."""
    following: dict[Key, float] = {}
    uses: list[list[float]] = []
    for number in range(len(trace) - 1, -1, -1):
        layer, rows, _ = trace[number]
        uses.append([following.get((layer, expert), inf) for expert, _ in rows])
        following.update({(layer, expert): number for expert, _ in rows})
    return uses[::-1]


HALF_LIFE = 16.0
"""Half-life in tokens; the best of those compared in published replays."""

_Use = tuple[Key, float, float, float]
"""An expert as a visit leaves it: (key, visit that needs it next, tokens before that, inflated aged count)."""


class Foresight:
    """A trace prepared for replays with knowledge of the next tokens.

    At a layer of a step is known which experts the later layers of this step need, and all layers of the steps that
    begin within the next `n_tokens` tokens. Like `belady` it keeps the experts needed soonest, and need not keep
    one that was just fetched. Experts that are not known to be needed count less than any that is, and stand by
    aged LFU, all aged to the same moment; of equals the one touched longest ago goes.

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
    """Drop one expert; meanwhile, forget entries used since, and move those whose next use is known now."""
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
    """Yield for every visit the number of tokens that have begun by then, and the experts it used."""
    history = History(_n_experts(trace))
    counts = AgedLfu(history, half_life)
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
        used = [(key, n, before[n], counts.rank(key)) for key, n in zip(keys, nexts, strict=True)]
        now = max(now, history.layer_tokens(layer))
        yield now, used


def _n_experts(trace: Sequence[Visit]) -> tuple[int, ...]:
    """Return the least number of experts by layer."""
    most: dict[int, int] = {}
    for layer, rows, _ in trace:
        most[layer] = max(most.get(layer, 0), *(expert + 1 for expert, _ in rows), 0)
    return tuple(most.get(layer, 0) for layer in range(max(most, default=-1) + 1))


FORESIGHTS = (1, 4, 16)
"""Numbers of tokens."""
BELADY = "belady"

MakePolicy = Callable[[], Policy]


@dataclass(frozen=True, slots=True)
class Score:
    """Result of one policy with one number of slots."""

    policy: str
    """Its name; `"belady"` and `"foresight N"` know the future."""
    n_slots: int
    replay: Replay
    ratio: float
    """Its expert reads over Belady's."""

    @property
    def knows(self) -> bool:
        """Whether it knows the future: a bound, not a policy that an engine could use."""
        return self.policy in BOUNDS


def foresight_name(n_tokens: int) -> str:
    """Return the name of a foresight of this many tokens."""
    return f"foresight {n_tokens}"


BOUNDS = (*map(foresight_name, FORESIGHTS), BELADY)


def compare(trace: Sequence[Visit], policies: Mapping[str, MakePolicy], sizes: Sequence[int]) -> Iterator[Score]:
    """Yield the score of every bound and policy with every number of slots, as it is found."""
    foresight = Foresight(trace)
    for n_slots in sizes:
        bound = belady(trace, n_slots)
        yield _score(BELADY, n_slots, bound, bound)
        for n_tokens in FORESIGHTS:
            yield _score(foresight_name(n_tokens), n_slots, foresight.replay(n_slots, n_tokens), bound)
        for name, make in policies.items():
            yield _score(name, n_slots, replay(trace, make(), n_slots), bound)


def _score(name: str, n_slots: int, played: Replay, bound: Replay) -> Score:
    # where Belady reads nothing there was nothing to read
    return Score(name, n_slots, played, played.n_misses / bound.n_misses if bound.n_misses else 1.0)
