"""The planners by name."""

from collections.abc import Mapping
from types import MappingProxyType

from fiddler.errors import ConfigError
from fiddler.scheduler.plan import Planner, all_cpu, all_fetch, descent

PLANNERS: Mapping[str, Planner] = MappingProxyType({"auto": descent, "all-cpu": all_cpu, "all-fetch": all_fetch})


def planner(name: str) -> Planner:
    """Return a planner. Raises `ConfigError` for an unknown name."""
    if name not in PLANNERS:
        raise ConfigError(f"unknown planner {name!r}; known: {', '.join(PLANNERS)}")
    return PLANNERS[name]
