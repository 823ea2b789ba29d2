"""Where a model's experts run: what an engine is put together from, whatever the device."""

from collections.abc import Callable
from dataclasses import dataclass

from fiddler.cost.model import CostModel
from fiddler.engine.graphs import Graphs
from fiddler.lanes.crossing import Crossing
from fiddler.lanes.experts import ExpertWork
from fiddler.lanes.gpu_jobs import GpuJobs
from fiddler.lanes.laneset import LaneSet
from fiddler.models.lookahead import Lookahead


def _nothing() -> None:
    return


def _no_graphs(lookahead: Lookahead | None) -> None:
    return


@dataclass(frozen=True, slots=True)
class Side:
    """The experts' side of an engine; the model's own side only knows the crossing."""

    crossing: Crossing
    work: ExpertWork | GpuJobs
    """What the lanes do jobs with."""
    costs: CostModel
    n_slots: int
    lanes: Callable[[], LaneSet]
    """Starts them: their threads live from then on."""
    graphs: Callable[[Lookahead | None], Graphs | None] = _no_graphs
    """Makes what records decoding steps, and owns where keys and values lie, where there is any."""
    close: Callable[[], None] = _nothing
    """To be called once the lanes have ended."""
