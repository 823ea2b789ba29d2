"""The experts' weights as blocks in host memory, one per expert, ready to be copied to a slot and locked for a GPU.

`BlockStore` reads every expert of a checkpoint into its block, in pieces that can be locked into RAM.

A GPU copies by itself only from memory that cannot be paged out. `cudaHostRegister` (CUDA Runtime API, "Memory
Management") locks existing memory, so a block is never in host memory twice. It locks whole pages, and registering
a page again is an error (`cudaErrorHostMemoryAlreadyRegistered`): pieces share no page. A copy must lie in one
registration or in none (CUDA Driver API, `cuMemcpy`; else `CUDA_ERROR_INVALID_VALUE`): no block is in two pieces.
"""

import logging
import mmap
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fiddler.errors import CheckpointError, FiddlerError
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.layout import ALIGNMENT, BlockLayout
from fiddler.store.mapped import ExpertParts, Layout, MappedStore
from fiddler.types import ExpertWeights

PAGE_BYTES = mmap.PAGESIZE
"""Bytes that the system locks at least: 4 KiB on x86, up to 64 KiB on Arm."""

PIECE_BYTES = 256 << 20
"""Most bytes that are locked at once, unless one block is more.

A refusal keeps the pieces locked before it, and may leave up to a piece unlocked that would have fitted. That is
little beside a model, and beside limits that are met (Docker on WSL2: 500 MB in all; microsoft/WSL, issue 14078); a
few hundred registrations in turn are nothing beside locking their pages."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """Which blocks are locked: the first experts of each layer."""

    n_bytes: int
    """Bytes of the locked blocks."""
    total_bytes: int
    """Bytes of all blocks."""
    experts: tuple[int, ...]
    """Number of locked experts by layer."""

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert's block is locked, and with it every byte of it."""
        return expert < self.experts[layer]


def cut(n_blocks: int, block_bytes: int, piece_bytes: int = PIECE_BYTES) -> list[int]:
    """Return the blocks in each piece: as many as fit `piece_bytes`, at least one; only the last has fewer."""
    most = max(piece_bytes // block_bytes, 1)
    full, rest = divmod(n_blocks, most)
    return [most] * full + [rest] * (rest > 0)


def on_pages(n_blocks: int, block_bytes: int) -> Tensor:
    """Return memory for blocks, uint8 `[n_blocks, block_bytes]`, that starts a page; less than two are wasted.

    Its last page is all its own: CUDA does not copy memory that is partly in a locked page.
    """
    n_bytes = n_blocks * block_bytes
    whole = -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
    room = torch.empty(whole + PAGE_BYTES - ALIGNMENT, dtype=torch.uint8)  # torch aligns to 64 bytes
    start = -room.data_ptr() % PAGE_BYTES
    return room[start : start + n_bytes].view(n_blocks, block_bytes)


logger = logging.getLogger("fiddler")

Convert = Callable[[ExpertWeights], ExpertWeights]
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


class BlockStore:
    """Every expert's block, read from the checkpoint at once; the checkpoint is not needed afterwards.

    Arguments are those of `MappedStore`; `convert` makes the weights that are kept from those that were read. The
    pages of the mapped files are released behind the reader, so memory stays near one copy. Raises
    `CheckpointError` where a tensor is missing, cannot be viewed, or has another shape than the same tensor of the
    layer's first expert. At most `piece_bytes` are locked into RAM at once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        dtype: torch.dtype,
        *,
        convert: Convert | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        source = _Source(checkpoint, layout, dtype, convert)

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

        `layouts` and `n_experts` are by layer. Blocks are written in order, each once. Raises the errors of `fill`.
        """
        store = cls.__new__(cls)
        store._make(layouts, n_experts, fill, piece_bytes)
        return store

    def _make(self, layouts: Iterable[BlockLayout], n_experts: Iterable[int], fill: Fill, piece_bytes: int) -> None:
        self._layers: list[_Layer] = []
        self._experts: dict[tuple[int, int], ExpertWeights] = {}
        self._n_locked = 0
        """Number of `_pieces` that are locked, from the first."""
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
        """Bytes of the largest block, and so of a slot."""
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
        """Do nothing: there is no file any more that could change."""

    def pin(self, pin: Callable[[Tensor], bool]) -> Pinned:
        """Offer the blocks to `pin`, piece by piece, until one is refused; return which blocks are locked now.

        `pin` locks the memory it is given, which starts a page and shares none with another piece, or returns
        False. Locked pieces are not offered again. Blocks that could not be locked are logged as a warning.
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

        Call it before the store is freed: the driver knows locked memory by its address, and refuses to lock memory
        that the system puts there next.
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
    convert: Convert | None

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """Return an expert's weights from a mapped store of its own: a converted copy lives no longer than they."""
        weights = MappedStore(self.checkpoint, self.layout, self.dtype).weights(layer, expert)
        if self.convert is None:
            return weights
        with self._reading(layer, expert):
            return self.convert(weights)

    def write(self, layer: int, expert: int, layout: BlockLayout, block: Tensor) -> None:
        """Write an expert's block, and release the pages it was read from."""
        weights = self.read(layer, expert)
        with self._reading(layer, expert):
            layout.write(weights, block)
        for tensor in _tensors(self.layout.experts[layer][expert]):
            self.checkpoint.release(tensor)

    @contextmanager
    def _reading(self, layer: int, expert: int) -> Generator[None]:
        """Name the expert whose weights are not as they should be."""
        try:
            yield
        except FiddlerError:
            raise  # some are ValueErrors
        except ValueError as error:
            where = f"{self.checkpoint.folder}, expert {expert} of layer {layer}"
            raise CheckpointError(f"{where}: {error}; download the checkpoint again") from error


def _tensors(parts: ExpertParts) -> set[str]:
    down_bias = () if parts.down_bias is None else (parts.down_bias,)
    return {view.tensor for view in (*parts.up, parts.down, *parts.up_bias, *down_bias)}
