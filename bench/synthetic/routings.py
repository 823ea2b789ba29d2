"""What to replay: a recording of a model of the same kind where there is one, otherwise routing drawn for it."""

from pathlib import Path

import bench
from bench.synthetic.shapes import Shape
from fiddler.cache.recorded import Recording, RoutingTrace, guesses
from fiddler.cache.synthetic import PUBLISHED, SyntheticRouting
from fiddler.store import routing

DEMO = Path(bench.__file__).parent / "traces" / "demo.safetensors"
"""Recorded with the demo model, whose layers and experts the tiny shape has."""


def recorded(file: Path = DEMO) -> RoutingTrace:
    """Read a recording (`fiddler.store.routing`). Raises `ConfigError`."""
    return routing.load(file)


def drawn(shape: Shape, n_sequences: int, n_tokens: int) -> RoutingTrace:
    """Draw sequences of so many tokens for a shape, with a made-up look-ahead.

    Experts are as popular and recur as often as in published replays of other models.
    """
    sizes = shape.sizes
    made = SyntheticRouting(sizes.n_layers, sizes.n_experts, sizes.top_k, PUBLISHED)
    sequences = [made.sequence(number, n_tokens) for number in range(n_sequences)]
    recordings = (Recording(str(i), 0, rows, ahead=guesses(rows, seed=i)) for i, rows in enumerate(sequences))
    return RoutingTrace(shape.name, (sizes.n_experts,) * sizes.n_layers, tuple(recordings))
