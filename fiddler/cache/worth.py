"""What a policy is: it says what an expert is worth, and nothing about slots."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.history import History
from fiddler.cache.keys import Key, Rows


class Policy(Protocol):
    """Numbers for an expert, valid whether it is resident or absent; higher stays.

    `rank` orders the experts of one layer, `rank - level` those of all layers, and `score` is their worth: never
    negative, in the same order, with ratios that mean something. `level` and ranks change through visits to their
    own layer only.
    """

    name: ClassVar[str]
    per_layer: ClassVar[bool] = False
    """True: slots are divided equally over the layers. False: one pool for all."""
    bypasses: ClassVar[bool] = False
    """True: an expert that was fetched and is worth less than its victim is not kept. False: the latest is kept."""
    by_recency: ClassVar[bool] = False
    """True: a visit touches all its experts alike, so what they are worth is asked before it is observed."""
    history: History

    def observe(self, layer: int, rows: Rows, n_tokens: int, scores: Sequence[float] | None = None) -> None:
        """Learn from one visit that `history` has recorded already; most policies need no more than that."""
        return

    def rank(self, key: Key) -> float:
        """The expert's place within its layer."""
        ...

    def level(self, layer: int) -> float:
        """How much higher the layer's ranks are than their worth beside other layers."""
        return 0.0

    def worths(self, layer: int) -> NDArray[np.float64]:
        """Return `rank - level` of a layer's experts, `[E]`."""
        ranks = [self.rank((layer, expert)) for expert in range(self.history.n_experts[layer])]
        return np.array(ranks) - self.level(layer)

    def score(self, key: Key) -> float:
        """What the expert is worth now; 0 for one that there is no reason to copy in."""
        return self.rank(key)

    def rate(self, key: Key) -> float:
        """Visits that the expert may expect per token, as far as the policy can say; 0 where it cannot."""
        return 0.0

    def admits(self, key: Key, n_slots: int) -> bool:
        """Whether the expert may hold one of `n_slots` slots at all."""
        return True

    def state(self) -> dict[str, object]:
        """What the policy knows beyond the history, JSON-able."""
        return {}

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state, after the history did; ValueError where it does not fit."""
        return
