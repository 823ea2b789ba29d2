"""How a GPU's memory is divided for one model: measured where it can be, before anything large is allocated."""

import logging

import torch

from fiddler.config import EngineConfig
from fiddler.cost.room import Room, budget, divide
from fiddler.devices.gpu import Gpu
from fiddler.engine.probe import Needs, needs
from fiddler.errors import ConfigError
from fiddler.models.loaded import ServableModel
from fiddler.store.blocks import PackedStore

logger = logging.getLogger("fiddler")

GRAPHS_BYTES = 256 << 20
"""Left for what recorded steps work in, and for the libraries' own buffers. Assumed, not measured: a piece of a
step works in what a layer's dense part does, which is little for the rows of a recorded step, and all kinds of one
wave share it."""


def divided(loaded: ServableModel, gpu: Gpu, config: EngineConfig) -> Room:
    """Move the dense part to the GPU, see what a step takes, and give slots the rest.

    Raises `ConfigError`, with what was wanted and what there is, where it is too little.
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
