"""What to replay: a recording of a model of the same kind where there is one, otherwise routing drawn for it."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import bench
from bench.synthetic.shapes import Shape
from fiddler.cache.recorded import Recording, RoutingTrace, guesses
from fiddler.cache.synthetic import PUBLISHED, SyntheticRouting, read_counts
from fiddler.errors import ConfigError
from fiddler.store import routing

DEMO = Path(bench.__file__).parent / "traces" / "demo.safetensors"
"""Recorded with the demo model, whose layers and experts the tiny shape has."""


def recorded(file: Path = DEMO) -> RoutingTrace:
    """Read a recording (`fiddler.store.routing`). Raises `ConfigError`."""
    return routing.load(file)


def drawn(
    shape: Shape, n_sequences: int, n_tokens: int, *, counts: Path | None = None, seed: int = 0
) -> RoutingTrace:
    """Draw sequences of so many tokens for a shape, with a made-up look-ahead.

    `counts` are visits of the real model, by layer and expert; a shape of fewer layers takes the first of them.
    Without, experts are as popular and recur as often as in published replays of other models. Raises `ConfigError`
    for counts of another number of experts, or of fewer layers.
    """
    sizes = shape.sizes
    if counts is None:
        made = SyntheticRouting(sizes.n_layers, sizes.n_experts, sizes.top_k, PUBLISHED, seed)
    else:
        made = SyntheticRouting.counted(_fitting(read_counts(counts), shape, counts), sizes.top_k, seed=seed)
    sequences = [made.sequence(number, n_tokens) for number in range(n_sequences)]
    return RoutingTrace(
        shape.name,
        (sizes.n_experts,) * sizes.n_layers,
        tuple(
            Recording(str(number), 0, experts, ahead=guesses(experts, seed=seed + number))
            for number, experts in enumerate(sequences)
        ),
    )


def _fitting(counts: NDArray[np.float64], shape: Shape, file: Path) -> NDArray[np.float64]:
    sizes = shape.sizes
    if counts.shape[0] < sizes.n_layers or counts.shape[1] != sizes.n_experts:
        raise ConfigError(
            f"{file}: counts of {counts.shape[0]} layers of {counts.shape[1]} experts, "
            f"where {shape.name} has {sizes.n_layers} of {sizes.n_experts}"
        )
    return counts[: sizes.n_layers]
