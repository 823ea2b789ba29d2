"""Least squares that forget: a linear fit to the latest examples."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.saved import counts, table

Array = NDArray[np.float64]

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
        """One visit's, `[I + 1, E]`: the inputs of each, and under them what they should have given."""
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
