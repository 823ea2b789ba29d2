"""The experts' weights in host memory: one copy, a block for each expert, ready to be copied to a slot."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fiddler.errors import CheckpointError
from fiddler.store.block import BlockLayout
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.host import MappedStore
from fiddler.store.layout import ExpertParts, Layout
from fiddler.types import ExpertWeights


@dataclass(frozen=True, slots=True)
class _Layer:
    layout: BlockLayout
    blocks: Tensor
    """uint8 `[E, nbytes]`, one allocation."""


class PackedStore:
    """Every expert's block, read from the checkpoint at once; the checkpoint is not needed afterwards.

    Takes what a `MappedStore` takes. The pages of the mapped files are released behind the reader, so memory stays
    near one copy. Raises `CheckpointError` where a tensor is missing, cannot be viewed, or has another shape than
    the same tensor of the layer's first expert.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype) -> None:
        self._layers: list[_Layer] = []
        self._experts: dict[tuple[int, int], ExpertWeights] = {}
        known: dict[BlockLayout, BlockLayout] = {}
        for layer in range(len(layout.experts)):
            # Layers alike share one layout: whoever keeps views can then compare layouts by identity.
            found = BlockLayout.of(_read(checkpoint, layout, dtype, (layer, 0)))
            shared = known.setdefault(found, found)
            blocks = _packed(checkpoint, layout, dtype, layer, shared)
            self._layers.append(_Layer(shared, blocks))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(layer.blocks.nbytes for layer in self._layers)

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block: what a slot must hold."""
        return max((layer.layout.nbytes for layer in self._layers), default=0)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """Return an expert's weights: views of its block, made when first asked for and kept."""
        key = (layer, expert)
        weights = self._experts.get(key)
        if weights is None:
            weights = self._experts[key] = self.layout(layer).views(self.block(layer, expert))
        return weights

    def block(self, layer: int, expert: int) -> Tensor:
        """Return an expert's block, uint8 `[layout(layer).nbytes]`."""
        return self._layers[layer].blocks[expert]

    def layout(self, layer: int) -> BlockLayout:
        """Return how a layer's blocks are laid out."""
        return self._layers[layer].layout


def _packed(checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype, layer: int, to: BlockLayout) -> Tensor:
    """Return a layer's blocks, uint8 `[E, nbytes]`, filled."""
    experts = layout.experts[layer]
    # Not one allocation for all layers: the system finds room for many middling ones more easily.
    blocks = torch.empty(len(experts), to.nbytes, dtype=torch.uint8)  # torch aligns to 64 bytes
    for expert, parts in enumerate(experts):
        try:
            to.write(_read(checkpoint, layout, dtype, (layer, expert)), blocks[expert])
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint.folder}, expert {expert} of layer {layer}: {error}; download the checkpoint again"
            ) from error
        for tensor in _tensors(parts):
            checkpoint.release(tensor)
    return blocks


def _read(checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype, key: tuple[int, int]) -> ExpertWeights:
    """Return an expert's weights from a mapped store of its own: a converted copy lives no longer than they do."""
    return MappedStore(checkpoint, layout, dtype).weights(*key)


def _tensors(parts: ExpertParts) -> set[str]:
    down_bias = () if parts.down_bias is None else (parts.down_bias,)
    return {view.tensor for view in (*parts.up, parts.down, *parts.up_bias, *down_bias)}
