"""An engine's cache policies by name: `forecast`, and those that count visits, `aged-lfu`, `lfu` and `lru`.

`forecast` evicts the expert whose next visit is expected last. An expert's chance of a visit is a weighted sum of
its recent visit counts over several half-lives. `Regression` learns the weights from the routing as it comes:
least squares in which old examples fade.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import History, Key, Policy, Rows, counts, number, part, table

Array = NDArray[np.float64]

HALF_LIVES = (1.0, 4.0, 16.0, 64.0, 1024.0)
"""Half-lives in tokens. Finer steps gain 0.2 %, three of these lose 0.7 % (expert reads on made-up routing)."""

_PRIOR = (0.0, 0.1, 0.1, 0.25, 0.25, 0.2)
"""Starting weights of a constant and of the shares by half-life: near those of most routing."""

_RAREST = 1e-4
"""The least chance of any expert: one that was never seen is rare, not impossible."""

_SHARES, _TARGET = slice(1, -1), -1
"""Positions in the rows of a layer's examples; the first row is a constant."""


class Forecast(Policy):
    """Score: 1 / the tokens until the expert's layer is expected to need it.

    An expert's chance with the next token is estimated as a weighted sum of its shares of the tokens gone by, aged
    with several half-lives. The weights are those of a least-squares fit over all experts of all layers, forgetting
    fast: each visit tells of every expert of its layer whether the last estimate was right, so a few tokens carry
    enough examples, and where the text changes its topic the weights move to the shares that follow it. An expert
    of chance p is due 1/p rounds of the layers after its layer's last visit, which puts layers that come soon
    before those just passed.
    """

    name: ClassVar[str] = "forecast"
    bypasses: ClassVar[bool] = True

    def __init__(self, history: History) -> None:
        self.history = history
        self._fit = Regression(_PRIOR, len(history.n_experts))
        self._round = float(len(history.n_experts))
        self._examples = [_blank(n) for n in history.n_experts]  # [1 + H + 1, E]: constant, shares, what came
        self._tokens = [np.zeros(len(HALF_LIVES)) for _ in history.n_experts]
        self._visits = [0] * len(history.n_experts)
        self._ranks = [[-self._round / _RAREST] * n for n in history.n_experts]
        self._worths = self._from_ranks()
        self._by_chunk: dict[int, tuple[Array, Array]] = {}

    def observe(self, layer: int, rows: Rows, n_tokens: int, scores: Sequence[float] | None = None) -> None:
        """Compare the layer's estimates with the visit, and estimate anew."""
        examples = self._examples[layer]
        came = examples[_TARGET]
        came[:] = 0.0
        for expert, n_rows in rows:
            came[expert] = n_rows / n_tokens
        if self._visits[layer]:
            self._fit.learn(examples)
        shares = examples[_SHARES]
        change = came - shares
        change *= self._novelty(layer, n_tokens)[:, None]
        shares += change
        chances = self._fit.weights @ examples[:_TARGET]
        np.maximum(chances, _RAREST, out=chances)
        np.minimum(chances, 1.0, out=chances)
        ranks = -self._round / chances
        self._ranks[layer], self._worths[layer] = ranks.tolist(), ranks - self.history.n_visits
        self._visits[layer] = self.history.n_visits

    def _novelty(self, layer: int, n_tokens: int) -> Array:
        """Return, by half-life, the visit's share of the aged tokens; 1 for the first visit."""
        if n_tokens not in self._by_chunk:
            rates = -np.log(2) / np.array(HALF_LIVES)
            self._by_chunk[n_tokens] = np.exp(rates * n_tokens), np.expm1(rates * n_tokens) / np.expm1(rates)
        decay, weight = self._by_chunk[n_tokens]
        tokens = self._tokens[layer] = self._tokens[layer] * decay + weight
        return weight / tokens

    def worths(self, layer: int) -> Array:
        """Return `rank - level` of a layer's experts, `[E]`."""
        return self._worths[layer]

    def _from_ranks(self) -> list[Array]:
        return [np.array(ranks) - visits for ranks, visits in zip(self._ranks, self._visits, strict=True)]

    def rank(self, key: Key) -> float:
        """Visits, of any layer, between the layer's last one and the expert's next, below 0."""
        return self._ranks[key[0]][key[1]]

    def level(self, layer: int) -> float:
        """The number of the layer's last visit: `level - rank` is that of the visit expected to need the expert."""
        return self._visits[layer]

    def score(self, key: Key) -> float:
        """The inverse of the rounds until then; one that is overdue goes on rising, and is never infinite."""
        layer = key[0]
        overdue = self.history.n_visits - self._visits[layer] + self._ranks[layer][key[1]]
        return -self._round / overdue if overdue < -1.0 else self._round * (2.0 + overdue)

    def rate(self, key: Key) -> float:
        """The expert's chance of a visit by the next token."""
        return -self._round / self._ranks[key[0]][key[1]]

    def state(self) -> dict[str, object]:
        """Return the aged shares, the ranks drawn from them, and the fit's evidence."""
        return {
            "half_lives": [list(HALF_LIVES)],
            "shares": [row for examples in self._examples for row in examples[_SHARES].tolist()],
            "tokens": [tokens.tolist() for tokens in self._tokens],
            "ranks": [list(ranks) for ranks in self._ranks],
            "visits": [list(self._visits)],
            "fit": self._fit.state(),
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state; ValueError, and nothing changed, where it does not fit."""
        shape, n_shares = self.history.n_experts, len(HALF_LIVES)
        if table(state, "half_lives", [n_shares]) != [list(HALF_LIVES)]:
            raise ValueError("saved shares are of other half-lives")
        rows = table(state, "shares", [n for n in shape for _ in range(n_shares)])
        tokens = table(state, "tokens", [n_shares] * len(shape))
        ranks = table(state, "ranks", shape)
        (visits,) = counts(state, "visits", [len(shape)])
        if not all(0 <= share <= 1 for row in rows for share in row) or any(n < 0 for row in tokens for n in row):
            raise ValueError("a saved share of the tokens is none")
        if not all(self._round <= -rank <= 2 * self._round / _RAREST for row in ranks for rank in row):
            raise ValueError("a saved rank is out of reach")
        if max(visits, default=0) > self.history.n_visits:
            raise ValueError("saved visits lie in the future")
        self._fit.restore(part(state, "fit"))
        self._examples = [_blank(n) for n in shape]
        for i, examples in enumerate(self._examples):
            examples[_SHARES] = rows[i * n_shares : (i + 1) * n_shares]
        self._tokens = [np.array(row) for row in tokens]
        self._ranks, self._visits = ranks, visits
        self._worths = self._from_ranks()


def _blank(n_experts: int) -> Array:
    examples = np.zeros((1 + len(HALF_LIVES) + 1, n_experts))
    examples[0] = 1.0
    return examples


_MEMORY = 8.0
"""Rounds of the layers after which an example counts half. 4 to 32 differ by 1 %; small models want more than 4."""

_CERTAINTY = 3.0
"""Examples of input 1 that the prior weights are worth."""

_EVERY = 8
"""Visits from one solution to the next: solving takes as long as all the rest of a visit."""


class Regression:
    """Weights `w`, `[I]`, that make `w @ x` the target, starting from a prior: ridge regression, kept up to date.

    `n_layers` visits are a round. Evidence is kept as normal equations, so no learning rate is to be chosen.
    """

    def __init__(self, prior: Sequence[float], n_layers: int) -> None:
        self.weights: Array = np.array(prior, dtype=np.float64)
        self._keep = 2.0 ** (-1.0 / (_MEMORY * n_layers))
        self._ridge = _CERTAINTY * np.eye(len(prior))
        self._pull = self._ridge @ self.weights
        self._products = np.zeros((len(prior) + 1, len(prior) + 1))
        self._n_learnt = 0

    def learn(self, examples: Array) -> None:
        """Learn from one visit, `[I + 1, E]`: the inputs of each expert, and in the last row its target."""
        self._products *= self._keep
        self._products += examples @ examples.T
        self._n_learnt += 1
        if self._n_learnt % _EVERY == 0:
            evidence, targets = self._products[:-1, :-1], self._products[:-1, -1]
            self.weights[:] = np.linalg.solve(evidence + self._ridge, targets + self._pull)

    def state(self) -> dict[str, object]:
        """Weights and evidence, JSON-able."""
        return {
            "weights": [self.weights.tolist()],
            "products": self._products.tolist(),
            "n_learnt": [[self._n_learnt % _EVERY]],
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state; ValueError, and nothing changed, where it does not fit."""
        n = len(self.weights)
        (weights,) = table(state, "weights", [n])
        products = np.array(table(state, "products", [n + 1] * (n + 1)))
        ((n_learnt,),) = counts(state, "n_learnt", [1])
        values = np.linalg.eigvalsh(products)
        # sums of squares: anything else could make the equations unsolvable
        if not np.array_equal(products, products.T) or values[0] < -1e-6 * max(1.0, values[-1]):
            raise ValueError("saved evidence is of no examples")
        self.weights, self._products, self._n_learnt = np.array(weights), products, n_learnt


_LOG_LIMIT = 64.0  # of a count: far above any real one, far below what overflows


class AgedLfu(Policy):
    """Score: rows, each weighing 2^(-age / half_life), its age in tokens of its own layer's clock.

    Kept as base-2 logarithms of the count *inflated* by 2^(clock / half_life): ageing then changes no stored
    number, the order within a layer holds between touches, and nothing overflows or needs rescaling.
    """

    name: ClassVar[str] = "aged-lfu"

    def __init__(self, history: History, half_life: float = 32.0) -> None:
        self.history = history
        self.half_life = half_life
        self._logs = [[-math.inf] * n for n in history.n_experts]
        self._decays: dict[int, float] = {}

    def observe(self, layer: int, rows: Rows, n_tokens: int, scores: Sequence[float] | None = None) -> None:
        """Add one visit, after the history recorded it."""
        logs = self._logs[layer]
        now = self.level(layer)
        decay = self._mean_decay(n_tokens)
        for expert, n_rows in rows:
            old, new = logs[expert], now + math.log2(n_rows * decay)
            low, high = (old, new) if old < new else (new, old)
            logs[expert] = high + math.log2(1.0 + math.exp2(low - high))

    def _mean_decay(self, n_tokens: int) -> float:
        """Return the mean weight of a row in a chunk, (1/T)·Σ_{i<T} 2^(-i/H): its place there is not known."""
        if n_tokens not in self._decays:
            ratio = -math.expm1(-n_tokens * math.log(2) / self.half_life)
            self._decays[n_tokens] = ratio / -math.expm1(-math.log(2) / self.half_life) / n_tokens
        return self._decays[n_tokens]

    def rank(self, key: Key) -> float:
        """The stored logarithm: comparable within a layer, unchanged until a touch; -inf if never touched."""
        return self._logs[key[0]][key[1]]

    def level(self, layer: int) -> float:
        """Return the number to subtract from the layer's ranks to get the logarithm of the aged count now."""
        return self.history.layer_tokens(layer) / self.half_life

    def score(self, key: Key) -> float:
        """The aged count now, in rows: comparable between layers."""
        return math.exp2(self._logs[key[0]][key[1]] - self.level(key[0]))

    def rate(self, key: Key) -> float:
        """The aged count over the tokens it stands for: the mean life of a visit, half-life / ln 2."""
        return self.score(key) * math.log(2) / self.half_life

    def state(self) -> dict[str, object]:
        """JSON-able; null stands for never touched."""
        logs = [[None if log == -math.inf else log for log in layer] for layer in self._logs]
        return {"half_life": self.half_life, "logs": logs}

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state, after the history did: the counts stay, and age at this half-life from now on.

        ValueError, and nothing changed, where the state does not fit.
        """
        saved_half_life = number(state, "half_life")
        if saved_half_life <= 0:
            raise ValueError(f"saved half-life is {saved_half_life}")
        logs = table(state, "logs", self.history.n_experts, blank=-math.inf)
        for layer, row in enumerate(logs):
            # exactly 0 for the half-life it was saved with, so that a restored cache names the same victims
            clock = self.history.layer_tokens(layer)
            if max(row, default=0.0) - clock / saved_half_life > _LOG_LIMIT:
                raise ValueError("saved counts are beyond reason")
            shift = clock / self.half_life - clock / saved_half_life
            logs[layer] = [log + shift for log in row]
        self._logs = logs


class Lfu(Policy):
    """Score: rows since the beginning."""

    name: ClassVar[str] = "lfu"

    def __init__(self, history: History) -> None:
        self.history = history

    def rank(self, key: Key) -> float:
        """Return the score."""
        return self.history.n_rows(key)


class Lru(Policy):
    """Score 1 / (visits to any layer since the last touch + 1)."""

    name: ClassVar[str] = "lru"
    by_recency: ClassVar[bool] = True

    def __init__(self, history: History) -> None:
        self.history = history

    def rank(self, key: Key) -> float:
        """The visit that touched the expert last."""
        return self.history.last_visit(key)

    def score(self, key: Key) -> float:
        """As a share, so that hysteresis compares ages."""
        last = self.history.last_visit(key)
        return 1 / (self.history.n_visits - last + 1) if last else 0.0


ADMISSION = 1.0
"""An expert that gives way for one that is demanded may be worth this many times as much."""
STAGED = 64
"""One slot in so many is for experts in passing, where not every expert has one."""

POLICIES: Mapping[str, Callable[[History, float], Policy]] = MappingProxyType(
    {
        AgedLfu.name: AgedLfu,
        Forecast.name: lambda history, half_life: Forecast(history),
        Lfu.name: lambda history, half_life: Lfu(history),
        Lru.name: lambda history, half_life: Lru(history),
    }
)
"""Each is made of a history and a half-life in tokens."""


def n_staging(n_slots: int, n_experts: Sequence[int]) -> int:
    """Return how many of a cache's slots are for experts in passing."""
    return n_slots // STAGED if n_slots < sum(n_experts) else 0


def make_cache(policy: str, n_slots: int, n_experts: tuple[int, ...], *, half_life: float) -> ExpertCache:
    """Return an engine's cache, empty."""
    made = POLICIES[policy](History(n_experts), half_life)
    return ExpertCache(n_slots, n_experts, made, admission=ADMISSION, n_staging=n_staging(n_slots, n_experts))
