"""What a model takes of a GPU's memory beside its weights: found by running one step that visits no expert."""

from dataclasses import dataclass

import torch

from fiddler.devices.gpu import Gpu
from fiddler.engine.request import past_bytes
from fiddler.models.dry import DryStep, dry_step
from fiddler.models.kv import SequenceKV
from fiddler.models.loaded import ServableModel


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of GPU memory."""

    kv_token: int
    """One token's keys and values, over all layers."""
    workspace: int
    """A step of as many rows as may join one: activations, and the rows of experts' visits."""


def needs(loaded: ServableModel, gpu: Gpu, n_rows: int) -> Needs:
    """Run a step of `n_rows` tokens of one sequence, with experts that give zero.

    Its torch calls go to the main stream. Raises `torch.OutOfMemoryError` where not even that fits.
    """
    steps: list[DryStep] = []

    def run() -> None:
        steps.append(dry_step(loaded.model, n_rows, packed=loaded.packed))

    with torch.inference_mode():
        peak = gpu.launch(lambda: gpu.peak(run))
        past = steps.pop().past
        held = past.token_bytes if isinstance(past, SequenceKV) else -(-past_bytes(past) // n_rows)
    return Needs(held, peak + _visits_bytes(loaded, n_rows) + _mask_bytes(loaded, n_rows))


def _mask_bytes(loaded: ServableModel, n_rows: int) -> int:
    """Return what a later chunk's mask takes, at the longest past: a bool, and what torch adds to scores, 16 bits.

    See `_tiled` in models/attention.py: the query heads of a key head have it once each.
    """
    groups = max(getattr(module, "num_key_value_groups", 1) for module in loaded.model.modules())
    longest = loaded.resolved.longest
    return 3 * groups * n_rows * longest if loaded.packed and longest > n_rows else 0


def _visits_bytes(loaded: ServableModel, n_rows: int) -> int:
    """Return what a layer's visits take while its experts run: their results, and what up and down have between."""
    widest = 0
    for layer in range(len(loaded.n_experts)):
        weights = loaded.weights(layer, 0)
        n_hidden, n_between = weights.down.shape
        ups = sum(matrix.shape[0] for matrix in weights.up)
        widest = max(widest, (2 * n_hidden + ups + n_between) * weights.down.element_size())
    return n_rows * loaded.top_k * widest
