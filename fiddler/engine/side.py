"""Where a model's experts run: what an engine is put together from, whatever the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fiddler.cache.cache import ExpertCache
from fiddler.cost.model import CostModel
from fiddler.lanes.experts import Crossing, ExpertWork
from fiddler.lanes.laneset import LaneSet

if TYPE_CHECKING:
    from fiddler.gpu.jobs import GpuJobs
    from fiddler.steps.graphs import Graphs, Resident


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Side:
    """The experts' side of an engine; the model's own side only knows the crossing."""

    crossing: Callable[[], Crossing]
    """Makes a wave's own."""
    work: "ExpertWork | GpuJobs"
    """What the lanes do jobs with."""
    costs: CostModel
    n_slots: int
    lanes: Callable[[], LaneSet]
    """Starts them: their threads live from then on."""
    graphs: "Graphs | None" = None
    """What records decoding steps, and knows where keys and values lie: for packed models on a GPU."""
    residents: "Callable[[ExpertCache], Callable[[], Resident | None]] | None" = None
    """What runs layers without the host, and when, by what a cache holds."""
    shrink: Callable[[], int] | None = None
    """Gives slots up where a GPU's memory ran out, while no lane works; returns how many are left, all empty."""
    close: Callable[[], None] = _nothing
    """To be called once the lanes have ended."""
