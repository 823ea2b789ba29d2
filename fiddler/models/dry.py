"""A step that visits no expert: what a model asks for, and what it takes, without reading any of its experts."""

import inspect
from typing import Any, NamedTuple

import torch

from fiddler.models.kv import Directness, SequenceKV, WaveCache
from fiddler.models.seam import Forward


class DryStep(NamedTuple):
    """What came of a step."""

    past: Any
    """The sequence's past: a `SequenceKV` of a packed model, else transformers' cache."""
    layers: tuple[int, ...]
    """Layers whose experts were asked for, as they were bound, in order."""


def dry_step(model: torch.nn.Module, n_rows: int, *, packed: bool) -> DryStep:
    """Run `n_rows` tokens of one sequence, from its beginning, with experts that give zero.

    `model` is bound to the seam; its attention is ours if `packed`.
    """
    device = next(model.parameters()).device
    past: Any = SequenceKV() if packed else None
    cache = WaveCache([past], [n_rows], Directness(), 0) if packed else None
    ids = torch.zeros(1, n_rows, dtype=torch.int64, device=device)
    positions = torch.arange(n_rows, device=device)[None]

    # As in a real step: a prompt's rows want no logits, but for the last one's.
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def call() -> Any:
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **extra)

    forward = Forward(call)
    forward.wave = cache
    layers: list[int] = []
    try:
        outcome = forward.send()
        while not forward.dead:
            layers.append(outcome.layer)
            outcome = forward.send(outcome.hidden.new_zeros(outcome.hidden.shape))
    finally:
        forward.close()
    return DryStep(past if packed else outcome.past_key_values, tuple(layers))
