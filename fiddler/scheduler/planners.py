"""The planners by name."""

from collections.abc import Mapping
from types import MappingProxyType

from fiddler.errors import ConfigError
from fiddler.scheduler.peer_plans import bandwidth_split, cheapest_each, cpu_or_stream, two_ended
from fiddler.scheduler.plan import Planner, all_cpu, all_fetch, best_cut

PLANNERS: Mapping[str, Planner] = MappingProxyType(
    {
        "auto": best_cut,
        "all-cpu": all_cpu,
        "all-fetch": all_fetch,
        "bandwidth-split": bandwidth_split,
        "cheapest-each": cheapest_each,
        "cpu-or-stream": cpu_or_stream,
        "two-ended": two_ended,
    }
)


def planner(name: str) -> Planner:
    """Return a planner. Raises `ConfigError` for an unknown name."""
    if name not in PLANNERS:
        raise ConfigError(f"unknown planner {name!r}; known: {', '.join(PLANNERS)}")
    return PLANNERS[name]
