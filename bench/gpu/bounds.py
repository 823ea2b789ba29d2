"""The share of what the machine could do at most that a reading reached.

`Bound` is what `fiddler simulate` and `bench.policies` hold a run against: the longest of three reads, of the
bytes that were really read, each at its full rate. Here the rates are the machine's own ceilings, as `facts`
measures them in the same run: the best of several ways to read host memory, a copy from pinned memory alone, and
the best way to read the GPU's memory.

The CPU's reads and the link's come from the same memory, which is not counted: both may be beyond reach at once.

The dense part counts once a step, less the embedding, of which a token reads a row; keys and values once a step
and sequence, at the reading's mean context. Where a step was two waves, each read the dense part: that is not
counted.
"""

from dataclasses import dataclass

from bench.gpu.running import Reading
from fiddler.cost.shape import ModelShape
from fiddler.engine.bounds import Bound


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second."""

    cpu: float
    link: float
    gpu: float


def bound(reading: Reading, shape: ModelShape, n_sequences: int, context: float, per_s: Rates) -> Bound:
    """Return the bound for a token; `context` is the mean number of tokens that a sequence attends to."""
    dense = shape.resident_bytes - (0 if shape.tied else shape.head_bytes)
    kept = n_sequences * context * (shape.n_layers + shape.n_dense_layers) * shape.kv_bytes_per_token
    read = reading.read_bytes
    return Bound(
        read["cpu"] / per_s.cpu,
        # A promotion counts when it starts, and may still be under way at the end: no more than was moved.
        min(read["link"] / per_s.link, reading.busy_s["link"]),
        (_gpu_bytes(reading, shape, n_sequences) + (dense + kept) / n_sequences) / per_s.gpu,
    )


def _gpu_bytes(reading: Reading, shape: ModelShape, n_sequences: int) -> float:
    """Return the experts' bytes that the GPU read for a token.

    Where every expert is in a slot nobody counts them; for one sequence they are known all the same.
    """
    if reading.hits is None and n_sequences == 1:
        return shape.n_layers * shape.top_k * shape.expert_bytes
    return reading.read_bytes["gpu"]


def knows_bytes(reading: Reading, n_sequences: int) -> bool:
    """Whether a reading says what was read."""
    return reading.hits is not None or n_sequences == 1
