"""Divides a GPU's memory for one model, before anything large is allocated.

The memory of a step, beside weights, is found by running one step that visits no expert.
"""

import logging
from dataclasses import dataclass

import torch

from fiddler.config import EngineConfig
from fiddler.errors import ConfigError
from fiddler.gpu.budget import Room, budget, divide
from fiddler.gpu.device import Gpu
from fiddler.gpu.scratch import scratch_bytes
from fiddler.gpu.slots import ability_of
from fiddler.models.kv import SequenceKV
from fiddler.models.loaded import ServableModel
from fiddler.models.packing import DryStep, dry_step
from fiddler.steps.request import past_bytes
from fiddler.store.blocks import PackedStore


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of GPU memory."""

    kv_token: int
    """One token's keys and values, over all layers."""
    workspace: int
    """Bytes of the largest step: activations, the rows of experts' visits, and decoded weights."""


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
    beside = _visits_bytes(loaded, n_rows) + _mask_bytes(loaded, n_rows) + _decoded_bytes(loaded, gpu)
    return Needs(held, peak + beside)


def _mask_bytes(loaded: ServableModel, n_rows: int) -> int:
    """Return the bytes of the largest attention mask: one bool and one 16-bit bias per (row, past token).

    Query heads that share a key head have it once each: see `_tiled` in models/attention.py.
    """
    groups = max(getattr(module, "num_key_value_groups", 1) for module in loaded.model.modules())
    longest = loaded.resolved.longest
    return 3 * groups * n_rows * longest if loaded.packed and longest > n_rows else 0


def _visits_bytes(loaded: ServableModel, n_rows: int) -> int:
    """Return the bytes of a layer's visits while its experts run: results, and the values between up and down."""
    widest = 0
    for layer in range(len(loaded.n_experts)):
        weights = loaded.weights(layer, 0)
        n_hidden, n_between = weights.down.shape
        ups = sum(matrix.shape[0] for matrix in weights.up)
        widest = max(widest, (2 * n_hidden + ups + n_between) * loaded.dtype.itemsize)
    return n_rows * loaded.top_k * widest


def _decoded_bytes(loaded: ServableModel, gpu: Gpu) -> int:
    """Return the bytes of the scratch in which quantised experts of many rows are decoded."""
    kernels = ability_of(gpu.device).runs_triton
    layers = enumerate(loaded.n_experts)
    sizes = (scratch_bytes(loaded.weights(layer, 0), n, loaded.dtype, kernels=kernels) for layer, n in layers)
    return max(sizes, default=0)


logger = logging.getLogger("fiddler")

GRAPHS_BYTES = 256 << 20
"""Bytes left for recorded steps, and for the libraries' own buffers. Assumed, not measured: a piece of a step uses
as much as a layer's dense part, which is little for the rows of a recorded step, and all kinds of one wave share
it."""


def divided(loaded: ServableModel, gpu: Gpu, config: EngineConfig) -> Room:
    """Move the dense part to the GPU, measure a step, and give the rest of the memory to slots.

    Raises `ConfigError`, with a table of needs and budget, where it is too little.
    """
    model: torch.nn.Module = loaded.model
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    dense_bytes = sum(tensor.nbytes for tensor in tensors.values())
    allowed = budget(config.vram_budget, gpu.memory().free)
    nothing_else = Needs(kv_token=0, workspace=0)
    _room(loaded, config, allowed, dense_bytes, nothing_else)  # refuse before what cannot fit is moved
    try:
        model.to(gpu.device)
        taken = needs(loaded, gpu, min(config.chunk_tokens, loaded.resolved.longest))
        gpu.reclaim()
        # The libraries have loaded by now, and what they took is nobody's any more.
        allowed = min(allowed, budget(None, gpu.memory().free + dense_bytes))
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU has no memory for a step of chunk_tokens={config.chunk_tokens} beside {dense_bytes} bytes of "
            f"dense weights; set chunk_tokens lower, or end what else uses the GPU: {error}"
        ) from error
    room = _room(loaded, config, allowed, dense_bytes, taken)
    logger.info("GPU memory of %s:\n%s", gpu.name, room.table())
    return room


def _room(loaded: ServableModel, config: EngineConfig, allowed: int, dense_bytes: int, taken: Needs) -> Room:
    store = loaded.store
    assert isinstance(store, PackedStore)
    return divide(
        allowed,
        dense_bytes=dense_bytes,
        kv_token_bytes=taken.kv_token,
        kv_tokens=loaded.resolved.kv_tokens or 0,
        workspace_bytes=taken.workspace + (GRAPHS_BYTES if config.graphs and loaded.packed else 0),
        slot_bytes=store.block_bytes,
        n_experts=sum(loaded.n_experts),
        asked_slots=config.slots,
    )
