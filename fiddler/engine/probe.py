"""What a model takes of a GPU's memory beside its weights: found by running one step that visits no expert."""

from dataclasses import dataclass
from typing import Any

import torch

from fiddler.devices.gpu import Gpu
from fiddler.engine.request import past_bytes
from fiddler.models.kv import Directness, SequenceKV, WaveCache
from fiddler.models.loaded import ServableModel
from fiddler.models.seam import Forward


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of GPU memory."""

    kv_token: int
    """One token's keys and values, over all layers."""
    workspace: int
    """A step of as many rows as may join one: activations, and the rows of experts' visits."""


def needs(loaded: ServableModel, gpu: Gpu, n_rows: int) -> Needs:
    """Run a step of `n_rows` tokens of one sequence, with experts that give zero.

    The main stream's torch calls come from this thread. Raises `torch.OutOfMemoryError` where not even that fits.
    """
    past: Any = SequenceKV() if loaded.packed else None

    def run() -> None:
        nonlocal past
        past = _blank_step(loaded, gpu.device, past, n_rows)

    with torch.inference_mode():
        peak = gpu.launch(lambda: gpu.peak(run))
        held = past.token_bytes if isinstance(past, SequenceKV) else -(-past_bytes(past) // n_rows)
    return Needs(held, peak + _visits_bytes(loaded, n_rows))


def _blank_step(loaded: ServableModel, device: torch.device, past: Any, n_rows: int) -> Any:
    """Return the past after a step from its beginning."""
    ids = torch.zeros(1, n_rows, dtype=torch.int64, device=device)
    cache = WaveCache([past], [n_rows], Directness(), 0) if loaded.packed else None

    def call() -> Any:
        positions = torch.arange(n_rows, device=device)[None]
        return loaded.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)

    forward = Forward(call)
    forward.wave = cache
    outcome, output = None, None
    try:
        while not forward.dead:
            outcome = forward.send(output)
            output = None if forward.dead else outcome.hidden.new_zeros(outcome.hidden.shape)
    finally:
        forward.close()
    assert outcome is not None
    return past if loaded.packed else outcome.past_key_values


def _visits_bytes(loaded: ServableModel, n_rows: int) -> int:
    """Return what a layer's visits take while its experts run: their results, and what up and down have between."""
    widest = 0
    for layer in range(len(loaded.n_experts)):
        weights = loaded.weights(layer, 0)
        n_hidden, n_between = weights.down.shape
        ups = sum(matrix.shape[0] for matrix in weights.up)
        widest = max(widest, (2 * n_hidden + ups + n_between) * weights.down.element_size())
    return n_rows * loaded.top_k * widest
