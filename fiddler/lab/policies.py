"""Cache policies by name, and those that only other systems use.

`Lfru` weighs frequency by age. `HybriMoe` scores experts by router probabilities (Zhong et al., 2025, "Hybrid
CPU-GPU Scheduling and Cache Management"). `Static` is a fixed placement, as in the original Fiddler: the first
experts of an order are resident for ever.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nlargest
from types import MappingProxyType
from typing import ClassVar

from fiddler.cache import policies
from fiddler.cache.policies import Lru
from fiddler.cache.policy import History, Key, Policy, Rows, table
from fiddler.errors import ConfigError


class LayerLru(Lru):
    """The expert touched longest ago goes, each layer having an equal quota.

    That is mixtral-offloading's cache (Eliseev and Mazur, 2023).
    """

    name: ClassVar[str] = "layer-lru"
    per_layer: ClassVar[bool] = True


class Lfru(Policy):
    """Score f / (now - last + 1): rows since the beginning over tokens of its own layer since the last touch."""

    name: ClassVar[str] = "lfru"

    def __init__(self, history: History) -> None:
        self.history = history

    def rank(self, key: Key) -> float:
        """Return the score."""
        age = self.history.layer_tokens(key[0]) - self.history.last_token(key)
        return self.history.n_rows(key) / (age + 1)


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
        """Return the score."""
        return self._scores[key[0]][key[1]]

    def state(self) -> dict[str, object]:
        """Return S of every expert."""
        return {"scores": [list(layer) for layer in self._scores]}

    def restore(self, state: Mapping[str, object]) -> None:
        """Load S of every expert."""
        self._scores = table(state, "scores", self.history.n_experts)


class Static(Policy):
    """Admits only the first `n_slots` experts of `order`, so nothing is ever evicted, and routing is ignored."""

    name: ClassVar[str] = "static"

    def __init__(self, history: History, order: Sequence[Key] | None = None) -> None:
        self.history = history
        order = uniform(history.n_experts) if order is None else order
        self._places = {key: place for place, key in enumerate(order)}

    def rank(self, key: Key) -> float:
        """Number of the order's experts from this one to the end; 0 for an expert that is not in the order."""
        return len(self._places) - self._places.get(key, len(self._places))

    def admits(self, key: Key, n_slots: int) -> bool:
        """Whether the expert is among the first `n_slots` of the order."""
        return self._places.get(key, n_slots) < n_slots


def uniform(n_experts: Sequence[int]) -> tuple[Key, ...]:
    """Return an order without knowledge: the first expert of every layer, then every second one, and so on."""
    keys = [(layer, expert) for layer, n in enumerate(n_experts) for expert in range(n)]
    return tuple(sorted(keys, key=lambda key: (key[1], key[0])))


def by_popularity(table: Sequence[Sequence[float]]) -> tuple[Key, ...]:
    """Return the order of a popularity table [L][E], most popular first; ties as in `uniform`."""
    keys = uniform([len(row) for row in table])
    return tuple(sorted(keys, key=lambda key: -table[key[0]][key[1]]))


@dataclass(frozen=True, slots=True)
class Options:
    """Options of policies: `half_life` in tokens, `top_k` of the router, `order` of a static placement."""

    half_life: float = 32.0
    top_k: int = 2
    order: tuple[Key, ...] | None = None


def _own(make: Callable[[History, float], Policy], history: History, options: Options) -> Policy:
    """Make one of the engine's."""
    return make(history, options.half_life)


_POLICIES: dict[str, Callable[[History, Options], Policy]] = {
    **{name: partial(_own, make) for name, make in policies.POLICIES.items()},
    HybriMoe.name: lambda history, options: HybriMoe(history, options.top_k),
    LayerLru.name: lambda history, options: LayerLru(history),
    Lfru.name: lambda history, options: Lfru(history),
    Static.name: lambda history, options: Static(history, options.order),
}
POLICIES = MappingProxyType(dict(sorted(_POLICIES.items())))


def make_policy(
    name: str,
    n_experts: tuple[int, ...],
    *,
    half_life: float = 32.0,
    top_k: int = 2,
    order: Sequence[Key] | None = None,
) -> Policy:
    """Return a policy with a history of its own. Raises `ConfigError` for an unknown name or a wrong option."""
    if name not in POLICIES:
        raise ConfigError(f"unknown cache policy {name!r}: known are {', '.join(POLICIES)}")
    if not 0 < half_life < float("inf"):
        raise ConfigError(f"half_life is a number of tokens above 0, not {half_life}")
    if top_k < 1:
        raise ConfigError(f"top_k is at least 1, not {top_k}")
    if order is not None and not _distinct_experts(order, n_experts):
        raise ConfigError("order names an expert twice, or one that the model does not have")
    return POLICIES[name](History(n_experts), Options(half_life, top_k, None if order is None else tuple(order)))


def _distinct_experts(order: Sequence[Key], n_experts: Sequence[int]) -> bool:
    real = {(layer, expert) for layer, n in enumerate(n_experts) for expert in range(n)}
    return len(set(order)) == len(order) and real.issuperset(order)
