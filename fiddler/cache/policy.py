"""The interface of a cache policy, the routing history that policies read, and the names that the cache shares.

A policy says how much an expert is worth; it knows nothing about slots. `History` records visits; policies share
one. Both can be saved as JSON. What is read back may be another run's: `ValueError` for anything that does not fit.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fiddler.given import shown

Key = tuple[int, int]
"""An expert: (layer, index in the layer)."""

Rows = Sequence[tuple[int, int]]
"""One visit to a layer: (expert, n_rows) pairs, each expert once, n_rows > 0."""
Visit = tuple[int, Rows, int]
"""One layer of one step: (layer, ((expert, n_rows), …), n_tokens)."""


class History:
    """Raw facts per layer and expert: nothing here is aged or weighed.

    Every layer has its own token clock, because waves stand at different layers at the same time.
    """

    def __init__(self, n_experts: tuple[int, ...]) -> None:
        self.n_experts = n_experts
        self.n_visits = 0
        """Layers visited so far, by all waves: the clock of `last_visit`."""
        self._layer_tokens = [0] * len(n_experts)
        self._layer_visits = [0] * len(n_experts)
        self._rows = [[0] * n for n in n_experts]
        self._last_visit = [[0] * n for n in n_experts]
        self._last_token = [[0] * n for n in n_experts]

    def observe(self, layer: int, rows: Rows, n_tokens: int) -> None:
        """Record one visit: `n_tokens` tokens passed `layer`. ValueError where none did."""
        if n_tokens < 1:
            raise ValueError(f"a visit carries at least one token, not {n_tokens}")
        self.n_visits += 1
        self._layer_visits[layer] += 1
        self._layer_tokens[layer] += n_tokens
        clock, visit = self._layer_tokens[layer], self.n_visits
        total, last_visit, last_token = self._rows[layer], self._last_visit[layer], self._last_token[layer]
        for expert, n_rows in rows:
            total[expert] += n_rows
            last_visit[expert] = visit
            last_token[expert] = clock

    @property
    def n_tokens(self) -> int:
        """Tokens seen by the layer that has seen most."""
        return max(self._layer_tokens, default=0)

    def layer_tokens(self, layer: int) -> int:
        """The layer's clock: tokens that passed it."""
        return self._layer_tokens[layer]

    def n_rows(self, key: Key) -> int:
        """Rows that visited the expert since the beginning."""
        return self._rows[key[0]][key[1]]

    def last_visit(self, key: Key) -> int:
        """`n_visits` at the expert's last touch; 0 if it was never touched."""
        return self._last_visit[key[0]][key[1]]

    def last_visits(self, layer: int) -> Sequence[int]:
        """The same of each of a layer's experts."""
        return self._last_visit[layer]

    def last_token(self, key: Key) -> int:
        """Its layer's clock at the expert's last touch; 0 if it was never touched."""
        return self._last_token[key[0]][key[1]]

    def state(self) -> dict[str, object]:
        """Return all counts, JSON-able."""
        return {
            "n_visits": [[self.n_visits]],
            "layers": [list(self._layer_tokens), list(self._layer_visits)],
            "rows": [list(row) for row in self._rows],
            "last_visit": [list(row) for row in self._last_visit],
            "last_token": [list(row) for row in self._last_token],
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state; ValueError, and nothing changed, where it is not of this shape."""
        n_layers, shape = len(self.n_experts), self.n_experts
        ((n_visits,),) = counts(state, "n_visits", [1])
        layer_tokens, layer_visits = counts(state, "layers", [n_layers, n_layers])
        facts = [counts(state, field, shape) for field in ("rows", "last_visit", "last_token")]
        for visits, tokens, clock in zip(facts[1], facts[2], layer_tokens, strict=True):
            if max(visits, default=0) > n_visits or max(tokens, default=0) > clock:
                raise ValueError("saved touches lie in the future")
        self.n_visits, self._layer_tokens, self._layer_visits = n_visits, layer_tokens, layer_visits
        self._rows, self._last_visit, self._last_token = facts


class Policy(Protocol):
    """Numbers for an expert, resident or absent; the higher stays.

    `rank` orders the experts of one layer, `rank - level` those of all layers, and `score` is their worth: never
    negative, in the same order, with ratios that mean something. Ranks and levels change only when their layer is
    visited.
    """

    name: ClassVar[str]
    per_layer: ClassVar[bool] = False
    """True: slots are divided equally over the layers. False: one pool for all."""
    bypasses: ClassVar[bool] = False
    """True: an expert that was fetched and is worth less than its victim is not kept. False: the latest is kept."""
    by_recency: ClassVar[bool] = False
    """True: a visit touches all its experts alike, so their worth is asked for before the visit is observed."""
    history: History

    def observe(self, layer: int, rows: Rows, n_tokens: int, scores: Sequence[float] | None = None) -> None:
        """Learn from one visit that `history` has recorded already; most policies need no more than that."""
        return

    def rank(self, key: Key) -> float:
        """The expert's place within its layer."""
        ...

    def level(self, layer: int) -> float:
        """How far the layer's ranks lie above a scale that all layers share."""
        return 0.0

    def worths(self, layer: int) -> NDArray[np.float64]:
        """Return `rank - level` of a layer's experts, `[E]`."""
        ranks = [self.rank((layer, expert)) for expert in range(self.history.n_experts[layer])]
        return np.array(ranks) - self.level(layer)

    def score(self, key: Key) -> float:
        """The expert's worth now; 0 where there is no reason to copy it in."""
        return self.rank(key)

    def rate(self, key: Key) -> float:
        """Expected visits of the expert per token; 0 where the policy cannot say."""
        return 0.0

    def admits(self, key: Key, n_slots: int) -> bool:
        """Whether the expert may hold one of `n_slots` slots at all."""
        return True

    def state(self) -> dict[str, object]:
        """Return the policy's knowledge beyond the history, JSON-able."""
        return {}

    def restore(self, state: Mapping[str, object]) -> None:
        """Load a saved state, after the history was loaded; raises `ValueError` where it does not fit."""
        return


_LIMIT = 1e18  # nothing that is counted here gets there; also keeps out nan, inf and endless integers


def text(state: Mapping[str, object], field: str) -> str:
    """A string; ValueError where there is none."""
    value = state.get(field)
    if not isinstance(value, str):
        raise ValueError(f"saved {field!r} is not a string")
    return value


def part(state: Mapping[str, object], field: str) -> Mapping[str, object]:
    """A nested object; ValueError where there is none."""
    value = state.get(field)
    if not isinstance(value, dict):
        raise ValueError(f"saved {field!r} is not an object")
    return value


def number(state: Mapping[str, object], field: str) -> float:
    """One finite number; ValueError where there is none."""
    return _finite(state.get(field), field)


def table(
    state: Mapping[str, object], field: str, shape: Sequence[int], *, blank: float | None = None
) -> list[list[float]]:
    """Return rows of finite numbers, row `i` with `shape[i]` entries; null becomes `blank`, if one is given.

    Raises `ValueError` for anything else.
    """
    rows = state.get(field)
    if not isinstance(rows, list) or [len(row) if isinstance(row, list) else -1 for row in rows] != list(shape):
        raise ValueError(f"saved {field!r} is not a table of {list(shape)} entries")
    return [
        [blank if value is None and blank is not None else _finite(value, field) for value in row] for row in rows
    ]


def counts(state: Mapping[str, object], field: str, shape: Sequence[int]) -> list[list[int]]:
    """A table of whole numbers from 0 on; ValueError otherwise."""
    rows = table(state, field, shape)
    if any(value < 0 or value != int(value) for row in rows for value in row):
        raise ValueError(f"saved {field!r} holds something that is no count")
    return [[int(value) for value in row] for row in rows]


def _finite(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LIMIT < value < _LIMIT:
        raise ValueError(f"saved {field!r} holds {shown(value)} where a finite number belongs")
    return value
