"""Policies side by side on one trace and several sizes of the cache, between foresight and Belady."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fiddler.cache.foresight import Foresight
from fiddler.cache.keys import Visit
from fiddler.cache.replay import Replay, belady, replay
from fiddler.cache.worth import Policy

FORESIGHTS = (1, 4, 16)
"""Tokens."""
BELADY = "belady"

MakePolicy = Callable[[], Policy]


@dataclass(frozen=True, slots=True)
class Score:
    """How one policy did with one number of slots."""

    policy: str
    """Its name; `"belady"` or `"foresight N"` for those that know what comes."""
    n_slots: int
    replay: Replay
    ratio: float
    """Its expert reads over Belady's."""

    @property
    def knows(self) -> bool:
        """Whether it knows what comes: a bound, and nothing that an engine could do."""
        return self.policy in BOUNDS


def foresight_name(n_tokens: int) -> str:
    """Return what foresight of so many tokens is called."""
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
