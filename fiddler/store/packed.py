"""The experts' weights in host memory: one copy, a block for each expert, ready to be copied to a slot."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fiddler.errors import CheckpointError
from fiddler.store.block import BlockLayout
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.host import MappedStore
from fiddler.store.layout import ExpertParts, Layout
from fiddler.store.pinned import PIECE_BYTES, Pinned, cut, on_pages
from fiddler.types import ExpertWeights

logger = logging.getLogger("fiddler")

Fill = Callable[[int, int, Tensor], None]
"""`(layer, expert, block)`: writes an expert's block, uint8 `[nbytes]`, in place."""


@dataclass(frozen=True, slots=True)
class _Layer:
    layout: BlockLayout
    pieces: tuple[Tensor, ...]
    """uint8 `[n, nbytes]` each, an allocation each; all but the last have the same number of blocks."""

    def block(self, expert: int) -> Tensor:
        piece, place = divmod(expert, len(self.pieces[0]))
        return self.pieces[piece][place]


class PackedStore:
    """Every expert's block, read from the checkpoint at once; the checkpoint is not needed afterwards.

    Takes what a `MappedStore` takes. The pages of the mapped files are released behind the reader, so memory stays
    near one copy. Raises `CheckpointError` where a tensor is missing, cannot be viewed, or has another shape than
    the same tensor of the layer's first expert. `piece_bytes` is what is locked into RAM at once at most.
    """

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype, *, piece_bytes: int = PIECE_BYTES
    ) -> None:
        source = _Source(checkpoint, layout, dtype)

        def fill(layer: int, expert: int, block: Tensor) -> None:
            source.write(layer, expert, self.layout(layer), block)

        # Each layout is found when its layer's turn comes: to look at an expert may convert it.
        layouts = (BlockLayout.of(source.read(layer, 0)) for layer in range(len(layout.experts)))
        self._make(layouts, layout.n_experts, fill, piece_bytes)

    @classmethod
    def filled(
        cls,
        layouts: Iterable[BlockLayout],
        n_experts: Iterable[int],
        fill: Fill,
        *,
        piece_bytes: int = PIECE_BYTES,
    ) -> Self:
        """Return a store without a checkpoint, whose blocks `fill` writes.

        `layouts` and `n_experts` are by layer. Blocks are written in order, each once. Raises what `fill` raises.
        """
        store = cls.__new__(cls)
        store._make(layouts, n_experts, fill, piece_bytes)
        return store

    def _make(self, layouts: Iterable[BlockLayout], n_experts: Iterable[int], fill: Fill, piece_bytes: int) -> None:
        self._layers: list[_Layer] = []
        self._experts: dict[tuple[int, int], ExpertWeights] = {}
        self._n_locked = 0
        """Of `_pieces`, from the first."""
        known: dict[BlockLayout, BlockLayout] = {}
        for layer, (found, n) in enumerate(zip(layouts, n_experts, strict=True)):
            # Layers alike share one layout: whoever keeps views can then compare layouts by identity.
            shared = known.setdefault(found, found)
            self._layers.append(_Layer(shared, _room(n, shared.nbytes, piece_bytes)))
            for expert in range(n):
                fill(layer, expert, self.block(layer, expert))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(piece.nbytes for piece in self._pieces)

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
        return self._layers[layer].block(expert)

    def layout(self, layer: int) -> BlockLayout:
        """Return how a layer's blocks are laid out."""
        return self._layers[layer].layout

    def check(self) -> None:
        """Do nothing: there is no file any more that could be changed."""

    def pin(self, pin: Callable[[Tensor], bool]) -> Pinned:
        """Offer the blocks to `pin`, piece by piece, until one is refused; return what is locked now.

        `pin` locks the memory it is given, which starts a page and shares none with another piece, or returns
        False. What is locked already is not offered again. What could not be locked is logged as a warning.
        """
        for piece in self._pieces[self._n_locked :]:
            if not pin(piece):
                break
            self._n_locked += 1
        pinned = self._pinned()
        if left := pinned.total_bytes - pinned.n_bytes:
            logger.warning(_LEFT, left / 1e9, pinned.total_bytes / 1e9)
        return pinned

    def unpin(self, unpin: Callable[[Tensor], None]) -> None:
        """Give `unpin` every piece that is locked, as `pin` was given it.

        To be called before the store goes: the driver knows locked memory by its address, and refuses to lock what
        the system puts there next.
        """
        pieces = self._pieces
        while self._n_locked:
            self._n_locked -= 1
            unpin(pieces[self._n_locked])

    @property
    def _pieces(self) -> list[Tensor]:
        return [piece for layer in self._layers for piece in layer.pieces]

    def _pinned(self) -> Pinned:
        left, experts = self._n_locked, list[int]()
        for layer in self._layers:
            locked = layer.pieces[:left]
            left -= len(locked)
            experts.append(sum(map(len, locked)))
        n_bytes = sum(piece.nbytes for piece in self._pieces[: self._n_locked])
        return Pinned(n_bytes, self.nbytes, tuple(experts))


_LEFT = (
    "%.2f of %.2f GB of experts could not be locked into memory: they reach the GPU through a staging ring, at the "
    "pace of the host's own copies. Raise the limit of locked memory (ulimit -l; memlock in limits.conf or of the "
    "container), or give the container or the virtual machine more memory"
)


def _room(n_blocks: int, block_bytes: int, piece_bytes: int) -> tuple[Tensor, ...]:
    # Not one allocation for everything: the system finds room for many middling ones more easily.
    return tuple(on_pages(n, block_bytes) for n in cut(n_blocks, block_bytes, piece_bytes))


@dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint's experts, read one at a time."""

    checkpoint: Checkpoint
    layout: Layout
    dtype: torch.dtype

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """Return an expert's weights from a mapped store of its own: a converted copy lives no longer than they."""
        return MappedStore(self.checkpoint, self.layout, self.dtype).weights(layer, expert)

    def write(self, layer: int, expert: int, layout: BlockLayout, block: Tensor) -> None:
        """Write an expert's block, and release what it was read from."""
        try:
            layout.write(self.read(layer, expert), block)
        except ValueError as error:
            where = f"{self.checkpoint.folder}, expert {expert} of layer {layer}"
            raise CheckpointError(f"{where}: {error}; download the checkpoint again") from error
        for tensor in _tensors(self.layout.experts[layer][expert]):
            self.checkpoint.release(tensor)


def _tensors(parts: ExpertParts) -> set[str]:
    down_bias = () if parts.down_bias is None else (parts.down_bias,)
    return {view.tensor for view in (*parts.up, parts.down, *parts.up_bias, *down_bias)}
