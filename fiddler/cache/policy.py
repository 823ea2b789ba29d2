"""The policies by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fiddler.cache.forecast import Forecast
from fiddler.cache.history import History
from fiddler.cache.hybrimoe import HybriMoe
from fiddler.cache.keys import Key
from fiddler.cache.lfru import Lfru
from fiddler.cache.lfu import AgedLfu, Lfu
from fiddler.cache.lru import LayerLru, Lru
from fiddler.cache.static import Static
from fiddler.cache.worth import Policy
from fiddler.errors import ConfigError

__all__ = ["POLICIES", "Options", "Policy", "make_policy"]


@dataclass(frozen=True, slots=True)
class Options:
    """What a policy may be told: `half_life` in tokens, `top_k` of the router, `order` of a static placement."""

    half_life: float = 32.0
    top_k: int = 2
    order: tuple[Key, ...] | None = None


POLICIES: Mapping[str, Callable[[History, Options], Policy]] = MappingProxyType(
    {
        AgedLfu.name: lambda history, options: AgedLfu(history, options.half_life),
        Forecast.name: lambda history, options: Forecast(history),
        HybriMoe.name: lambda history, options: HybriMoe(history, options.top_k),
        LayerLru.name: lambda history, options: LayerLru(history),
        Lfru.name: lambda history, options: Lfru(history),
        Lfu.name: lambda history, options: Lfu(history),
        Lru.name: lambda history, options: Lru(history),
        Static.name: lambda history, options: Static(history, options.order),
    }
)


def make_policy(
    name: str,
    n_experts: tuple[int, ...],
    *,
    half_life: float = 32.0,
    top_k: int = 2,
    order: Sequence[Key] | None = None,
) -> Policy:
    """A policy with a history of its own. ConfigError for an unknown name or an impossible option."""
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
