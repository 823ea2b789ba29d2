"""The policy `forecast`: evicts the expert whose next visit is expected last.

An expert's chance of a visit is a weighted sum of its recent visit counts over several half-lives. `Regression`
learns the weights from the routing as it comes: least squares in which old examples fade.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.policy import History, Key, Policy, Rows, counts, part, table

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
