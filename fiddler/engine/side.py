"""`Side`: the parts of an engine that differ by device."""

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
    """The parts that run a model's experts; the model's own side only knows the crossing."""

    crossing: Callable[[], Crossing]
    """Makes a wave's own crossing."""
    work: "ExpertWork | GpuJobs"
    """Runs the lanes' jobs."""
    costs: CostModel
    n_slots: int
    lanes: Callable[[], LaneSet]
    """Starts the lanes and their threads."""
    graphs: "Graphs | None" = None
    """Records decoding steps, and knows where keys and values lie: for packed models on a GPU."""
    residents: "Callable[[ExpertCache], Callable[[], Resident | None]] | None" = None
    """Given the cache, returns a function that yields the `Resident` runner while every expert is in a slot, else
    `None`."""
    shrink: Callable[[], int] | None = None
    """Gives slots up when a GPU's memory has run out, while no lane works; returns how many are left, all empty."""
    close: Callable[[], None] = _nothing
    """Releases everything; call it once the lanes have ended."""
