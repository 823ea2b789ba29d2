"""HybriMoE's score (Zhong et al., 2025, "Hybrid CPU-GPU Scheduling and Cache Management"): router probabilities."""

from collections.abc import Mapping, Sequence
from heapq import nlargest
from typing import ClassVar

from fiddler.cache.history import History
from fiddler.cache.keys import Key, Rows
from fiddler.cache.saved import table
from fiddler.cache.worth import Policy


class HybriMoe(Policy):
    """S ← ½·TopP(s) + ½·S at every visit, TopP keeping the 2·top_k largest of s and clearing the rest.

    s are the router's probabilities, averaged over the visit's tokens; where they are not given, rows per token.
    """

    name: ClassVar[str] = "hybrimoe"
    per_layer: ClassVar[bool] = True

    def __init__(self, history: History, top_k: int = 2) -> None:
        self.history = history
        self._n_kept = 2 * top_k
        self._scores = [[0.0] * n for n in history.n_experts]

    def observe(self, layer: int, rows: Rows, n_tokens: int, scores: Sequence[float] | None = None) -> None:
        """Update the whole layer; `scores` are summed over the tokens, one for each expert of the layer."""
        shares = dict(enumerate(scores)) if scores is not None else dict(rows)
        updated = [0.5 * score for score in self._scores[layer]]
        for expert in nlargest(self._n_kept, shares, key=lambda expert: (shares[expert], -expert)):
            updated[expert] += 0.5 * shares[expert] / n_tokens
        self._scores[layer] = updated

    def rank(self, key: Key) -> float:
        """The same as the score."""
        return self._scores[key[0]][key[1]]

    def state(self) -> dict[str, object]:
        """S of every expert."""
        return {"scores": [list(layer) for layer in self._scores]}

    def restore(self, state: Mapping[str, object]) -> None:
        """S of every expert."""
        self._scores = table(state, "scores", self.history.n_experts)
