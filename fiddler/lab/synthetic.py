"""Makes up routing: popular experts, experts that recur from token to token, topics that drift.

An expert's chance is its popularity in the layer, raised for those the sequence visited a moment ago and for those
its topic, or the passage of its text, favours; experts are then drawn without replacement (Gumbel top-k: Kool et
al., "Stochastic beams and where to find them", ICML 2019). The popularity may be that of a real model, from counts
of its visits.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fiddler.errors import ConfigError
from fiddler.given import read_json

_OTHER_TEXT, _OTHER_TOKENS = range(1000, 1006), 192
"""Numbers and length of the sequences for a profile; the numbers are too high to be used by chance."""
_RAREST, _OFTENEST = 1e-4, 1.0 - 1e-4
"""Limits of an expert's share of tokens: one that was never seen visited is rare, not impossible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How far routing is from uniform. Without skew, topic, passage and recurrence it is uniform and independent.

    By default 0.45 of a token's experts recur in the next token of Mixtral's shape (chance: 0.25) and 0.18 in
    Qwen3-30B-A3B's (0.06), and a third to a half of a layer's favourites change within 100 tokens. Assumed, within
    what is published: Mixtral's experts repeat above chance in middle layers (Jiang et al., "Mixtral of experts",
    2024, table 5), and 22 to 58 % of a layer's favourites change in 100 tokens in replays of other models.
    """

    skew: float = 0.5
    """Standard deviation of the log popularity of a layer's experts, the same for all text."""
    topic: float = 0.5
    """Standard deviation of the log popularity that a topic adds."""
    recurrence: float = 0.8
    """Added to the log chance of an expert visited by the token before."""
    drift: float = 0.01
    """Chance per token that a sequence takes up another topic."""
    memory: float = 1.0
    """Tokens after which the effect of recurrence counts half."""
    passage: float = 0.0
    """Standard deviation of the log popularity that a passage of the text adds; passages are short topics."""
    passage_drift: float = 0.0
    """Chance per token that a sequence comes to another passage."""
    spread: float = 0.0
    """Layers differ: standard deviation of the log of how strong all of the above is in a layer."""
    fineness: float = 0.0
    """Models of many small experts have stronger habits: all is multiplied by (½·log2(E / k))^fineness, which is 1
    for Mixtral's shape and 2^fineness for Qwen3-30B-A3B's."""


PUBLISHED = Habits(
    skew=0.3,
    topic=0.7,
    recurrence=0.25,
    drift=0.002,
    memory=3.5,
    passage=0.5,
    passage_drift=0.03,
    spread=0.4,
    fineness=1.3,
)
"""Fitted to published replays of real models, and kept for judging: no policy is tuned on them.

Expert reads over Belady's, median of the four models of `fiddler/shapes` with 10, 20 and 40 % resident, two
sequences of 500 tokens, every miss kept. Published: nine models, three sizes.

    ================================  ================  ================
                                      published         made up
    ================================  ================  ================
    LFU                               1.93 (to 6.15)    2.54 (to 4.9)
    LRU                               1.77              2.11
    aged LFU, half-life 16            1.70              1.75
    S3-FIFO                           1.69              1.90
    static, from other text           2.74 (to 13.2)    3.53 (to 11.9)
    foresight of 1, 4, 16 tokens      1.45, 1.13, 1.01  1.48, 1.13, 1.01
    LFRU beside LRU                   -15 to -22 %      -7 %
    a quota for each layer            +3 to +34 %       +7 %
    top set changed in 100 tokens     22 to 58 %        29 to 47 %
    recur in Mixtral (chance: 25 %)   above chance      41 %
    ================================  ================  ================

LFU, LRU and the static profile are too bad here: what is gained over them is flattered. The aged LFU is not.
"""


@dataclass(slots=True)
class SyntheticRouting:
    """Draws routings of one made-up model; the same for the same seed."""

    n_layers: int
    n_experts: int
    top_k: int
    habits: Habits = Habits()
    seed: int = 0
    popularity: NDArray[np.float64] | None = field(default=None, repr=False)
    """Log chances by layer and expert, `[L, E]`; `None` draws them with `habits.skew`."""

    @classmethod
    def counted(cls, counts: NDArray[np.float64], top_k: int, *, habits: Habits = Habits(), seed: int = 0) -> Self:
        """Draw experts as often as `counts` `[L, E]` says they were visited; topics are in the counts already.

        Of `E` experts `k` are drawn, `i` in a share `p` of all draws, where its chance is `-log(1 - p)` (Rosén,
        "Asymptotic theory for successive sampling", 1972). Recurrence makes the popular somewhat more so.
        """
        share = top_k * counts / counts.sum(axis=1, keepdims=True)
        popularity = np.log(-np.log1p(-np.clip(share, _RAREST, _OFTENEST)))
        n_layers, n_experts = counts.shape
        habits = replace(habits, topic=0.0, passage=0.0, spread=0.0, fineness=0.0)
        return cls(n_layers, n_experts, top_k, habits, seed, popularity)

    def sequence(self, number: int, n_tokens: int) -> NDArray[np.int16]:
        """Return the experts that sequence `number` visits, `[T, L, K]`."""
        popularity, strength = self._popularity(), self._strength()
        # passages have a source of chance of their own, so that they leave everything else as it is without them
        random, passages = (np.random.default_rng([self.seed, kind, number]) for kind in (1, 2))
        habits, shape = self.habits, (self.n_layers, self.n_experts)
        topic = random.normal(0.0, habits.topic, shape)
        passage = passages.normal(0.0, habits.passage, shape)
        visited = np.zeros(shape)
        fading = 2.0 ** (-1.0 / habits.memory)
        rows = np.empty((n_tokens, self.n_layers, self.top_k), dtype=np.int16)
        for token in range(n_tokens):
            if random.random() < habits.drift:
                topic = random.normal(0.0, habits.topic, shape)
            if passages.random() < habits.passage_drift:
                passage = passages.normal(0.0, habits.passage, shape)
            chance = strength * (popularity + topic + passage + visited) + random.gumbel(size=shape)
            chosen = np.argpartition(chance, -self.top_k, axis=1)[:, -self.top_k :]
            rows[token] = np.sort(chosen, axis=1)
            visited *= fading
            np.put_along_axis(visited, chosen, habits.recurrence, axis=1)
        return rows

    def profile(self) -> NDArray[np.int64]:
        """Return how often other text of the model visits each expert, `[L, E]`: knowledge for a placement."""
        other = np.concatenate([self.sequence(number, _OTHER_TOKENS) for number in _OTHER_TEXT])
        counts = [np.bincount(other[:, layer].ravel(), minlength=self.n_experts) for layer in range(self.n_layers)]
        return np.array(counts)

    def _strength(self) -> NDArray[np.float64]:
        fine = (0.5 * np.log2(self.n_experts / self.top_k)) ** self.habits.fineness
        layers = np.random.default_rng([self.seed, 3]).normal(0.0, self.habits.spread, (self.n_layers, 1))
        return np.asarray(fine * np.exp(layers))

    def _popularity(self) -> NDArray[np.float64]:
        if self.popularity is not None:
            return self.popularity
        random = np.random.default_rng([self.seed, 0])
        return random.normal(0.0, self.habits.skew, (self.n_layers, self.n_experts))


def read_counts(file: Path) -> NDArray[np.float64]:
    """Read how often each expert was visited, `[L, E]`, from a file's `expert_popularity`.

    Raises `ConfigError` for a file that has no such table of numbers.
    """
    try:
        counts = np.array(read_json(file)["expert_popularity"], dtype=np.float64)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{file}: no table of visits under 'expert_popularity': {error}") from error
    if counts.ndim != 2 or not np.isfinite(counts).all() or (counts < 0).any() or not counts.sum(axis=-1).all():
        raise ConfigError(f"{file}: 'expert_popularity' must be counts by layer and expert, some in every layer")
    return counts
