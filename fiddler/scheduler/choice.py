"""The planners of an engine by name, its ways of copying ahead, and a scheduler with those that were chosen.

The lab has more of both, for `fiddler simulate`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fiddler.cache.cache import ExpertCache
from fiddler.config import EngineConfig
from fiddler.cost.model import CostModel
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.guesses import PAYS, Auto, Nobody, Predictor, Rule
from fiddler.scheduler.plan import Planner, all_cpu, all_fetch, best_cut
from fiddler.trace import Trace

PLANNERS: Mapping[str, Planner] = MappingProxyType({"auto": best_cut, "all-cpu": all_cpu, "all-fetch": all_fetch})

PREFETCH: Mapping[str, Callable[[ExpertCache], tuple[Predictor, Rule]]] = MappingProxyType(
    {"auto": lambda cache: (Auto(cache), PAYS), "off": lambda cache: (Nobody(), PAYS)}
)
"""Makes a predictor, and the rule that picks copies from its guesses."""


def scheduler_for(
    config: EngineConfig, cache: ExpertCache, costs: CostModel, trace: Trace | None = None
) -> Scheduler:
    """Return the scheduler of an engine with an accelerator."""
    return Scheduler(
        cache,
        costs,
        planner=PLANNERS[config.planner],
        promote=config.promote,
        ahead=PREFETCH[config.prefetch](cache),
        trace=trace,
    )
