"""Who runs what: each load of a layer on the CPU, from the GPU's cache, or copied in first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fiddler.cost.model import CostModel
from fiddler.scheduler.routing import Load


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a plan knows of one load."""

    load: Load
    place: Literal["hit", "landing", "miss"]
    """Its weights are in a slot, on their way into one, or on the host alone."""
    ahead_s: float = 0.0
    """Of a landing one: seconds of link work, as it takes alone, until it has landed."""
    score: float = 0.0
    """The cache's; of misses with equal rows the higher is fetched, for it stays."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Seconds of work queued in each lane, as it takes alone."""

    cpu_s: float = 0.0
    gpu_s: float = 0.0
    link_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Every load of a layer in one of three places."""

    cpu: tuple[Load, ...]
    gpu: tuple[Load, ...]
    """From slots: those READY at once, those landing as they land, in landing order."""
    fetch: tuple[Load, ...]
    """Copied in and then run on the GPU, in the order of the copies."""
    predicted_s: float
    """From now until the last of them is done."""


Planner = Callable[[int, Sequence[Candidate], CostModel, Backlog, int], Plan]
"""`(layer, candidates, costs, backlog, n_fetch) -> Plan`, with at most `n_fetch` fetches."""
