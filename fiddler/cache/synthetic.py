"""Routing made up: popular experts, experts that recur from token to token, topics that drift.

An expert's chance is its popularity in the layer, raised for those the sequence visited a moment ago and for those
its topic favours; experts are then drawn without replacement (Gumbel top-k: Kool et al., "Stochastic beams and where
to find them", ICML 2019).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How far routing is from uniform. All zero is uniform and independent."""

    skew: float = 0.6
    """Standard deviation of the log popularity of a layer's experts, the same for all text."""
    topic: float = 1.0
    """The same, of what a topic adds."""
    recurrence: float = 1.5
    """Added to the log chance of an expert visited by the token before."""
    drift: float = 0.01
    """Chance per token that a sequence takes up another topic."""


@dataclass(slots=True)
class SyntheticRouting:
    """Draws routings of one made-up model; the same for the same seed."""

    n_layers: int
    n_experts: int
    top_k: int
    habits: Habits = Habits()
    seed: int = 0

    def sequence(self, number: int, n_tokens: int) -> NDArray[np.int16]:
        """Return the experts that sequence `number` visits, `[T, L, K]`."""
        popularity = self._popularity()
        random = np.random.default_rng([self.seed, 1, number])
        habits, shape = self.habits, (self.n_layers, self.n_experts)
        topic = random.normal(0.0, habits.topic, shape)
        visited = np.zeros(shape)
        rows = np.empty((n_tokens, self.n_layers, self.top_k), dtype=np.int16)
        for token in range(n_tokens):
            if random.random() < habits.drift:
                topic = random.normal(0.0, habits.topic, shape)
            chance = popularity + topic + visited + random.gumbel(size=shape)
            chosen = np.argpartition(chance, -self.top_k, axis=1)[:, -self.top_k :]
            rows[token] = np.sort(chosen, axis=1)
            visited *= 0.5
            np.put_along_axis(visited, chosen, habits.recurrence, axis=1)
        return rows

    def _popularity(self) -> NDArray[np.float64]:
        random = np.random.default_rng([self.seed, 0])
        return random.normal(0.0, self.habits.skew, (self.n_layers, self.n_experts))
