"""Blocks locked into RAM: in pieces that share no page, as far as the system lets us, and undone at the end."""

import logging
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fiddler.store.blocks import PAGE_BYTES, PIECE_BYTES, BlockStore, Pinned, cut, on_pages
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import SINGLE
from fiddler.store.layout import ALIGNMENT
from fiddler.store.mapped import ExpertParts, Layout, Select, View

WIDTHS = (12, 300, 7)
"""By layer: blocks of less than a page, of several, and of an odd number of cache lines."""
N_EXPERTS = (9, 5, 16)
EXPERTS = [(layer, expert) for layer, n in enumerate(N_EXPERTS) for expert in range(n)]
PIECES = st.integers(1, 5 * PAGE_BYTES)


@dataclass
class Driver:
    """What CUDA does with host memory: it locks whole pages, each once, and knows them by address and size."""

    limit: float = float("inf")
    locked: dict[int, int] = field(default_factory=dict)
    offered: list[int] = field(default_factory=list)

    def pin(self, memory: Tensor) -> bool:
        start, n_bytes = memory.data_ptr(), memory.nbytes
        self.offered.append(start)
        assert memory.is_contiguous()
        assert n_bytes > 0
        for other, size in self.locked.items():
            assert not pages(other, size) & pages(start, n_bytes), "a page is registered again"
        if self.n_bytes + n_bytes > self.limit:
            return False
        self.locked[start] = n_bytes
        return True

    def unpin(self, memory: Tensor) -> None:
        assert self.locked.pop(memory.data_ptr()) == memory.nbytes

    @property
    def n_bytes(self) -> int:
        return sum(self.locked.values())

    def holds(self, block: Tensor) -> bool:
        """Whether a copy of the block lies in one registration; it may not lie in more than one or in a part."""
        start, end = block.data_ptr(), block.data_ptr() + block.nbytes
        inside = [s <= start and end <= s + n for s, n in self.locked.items()]
        assert sum(s < end and start < s + n for s, n in self.locked.items()) == sum(inside) <= 1
        return any(inside)


def pages(start: int, n_bytes: int) -> set[int]:
    return set(range(start // PAGE_BYTES, (start + n_bytes - 1) // PAGE_BYTES + 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Layout]:
    folder = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{layer}.{part}": torch.rand(n, 4, width, generator=generator)
        for layer, (n, width) in enumerate(zip(N_EXPERTS, WIDTHS, strict=True))
        for part in ("up", "down")
    }
    save_file(tensors, folder / SINGLE)
    experts = [
        tuple(ExpertParts((View(f"{i}.up", (Select(e),)),), View(f"{i}.down", (Select(e),))) for e in range(n))
        for i, n in enumerate(N_EXPERTS)
    ]
    return Checkpoint.open(folder), Layout(tuple(experts))


def packed(saved: tuple[Checkpoint, Layout], piece_bytes: int = PIECE_BYTES) -> BlockStore:
    return BlockStore(*saved, torch.float32, piece_bytes=piece_bytes)


class TestPieces:
    @given(n_blocks=st.integers(1, 300), lines=st.integers(1, 100), piece_bytes=st.integers(1, 30_000))
    def test_every_block_is_in_one_piece_and_pieces_are_as_large_as_may_be(
        self, n_blocks: int, lines: int, piece_bytes: int
    ) -> None:
        block_bytes = lines * ALIGNMENT
        sizes = cut(n_blocks, block_bytes, piece_bytes)
        assert sum(sizes) == n_blocks
        assert set(sizes[:-1]) <= {sizes[0]}
        assert 1 <= sizes[-1] <= sizes[0]
        assert sizes[0] == 1 or sizes[0] * block_bytes <= piece_bytes
        assert len(sizes) == 1 or (sizes[0] + 1) * block_bytes > piece_bytes

    @given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 200)), max_size=6))
    def test_pieces_have_their_pages_for_themselves(self, sizes: list[tuple[int, int]]) -> None:
        pieces = [on_pages(n, lines * ALIGNMENT) for n, lines in sizes]
        seen: set[int] = set()
        for piece, (n, lines) in zip(pieces, sizes, strict=True):
            assert piece.shape == (n, lines * ALIGNMENT)
            assert piece.data_ptr() % PAGE_BYTES == 0
            assert piece.untyped_storage().nbytes() - piece.nbytes < 2 * PAGE_BYTES
            assert not seen & pages(piece.data_ptr(), piece.nbytes)
            seen |= pages(piece.data_ptr(), piece.nbytes)


class TestPin:
    def test_a_layer_starts_a_page_and_is_one_piece_if_it_fits(self, saved: tuple[Checkpoint, Layout]) -> None:
        store, driver = packed(saved), Driver()
        pinned = store.pin(driver.pin)
        assert driver.offered == [store.block(layer, 0).data_ptr() for layer in range(len(N_EXPERTS))]
        assert all(start % PAGE_BYTES == 0 for start in driver.offered)
        assert pinned == Pinned(store.nbytes, store.nbytes, N_EXPERTS)

    @given(piece_bytes=PIECES, share=st.floats(0, 1))
    def test_what_was_locked_before_a_refusal_is_kept_and_known(
        self, saved: tuple[Checkpoint, Layout], piece_bytes: int, share: float
    ) -> None:
        store = packed(saved, piece_bytes)
        driver = Driver(limit=share * store.nbytes)
        pinned = store.pin(driver.pin)
        assert (pinned.n_bytes, pinned.total_bytes) == (driver.n_bytes, store.nbytes)
        held = {key: driver.holds(store.block(*key)) for key in EXPERTS}
        assert held == {key: pinned.holds(*key) for key in EXPERTS}
        assert sum(store.block(*key).nbytes for key in EXPERTS if held[key]) == pinned.n_bytes
        assert len(driver.offered) == len(driver.locked) + (pinned.n_bytes < pinned.total_bytes)

    @given(piece_bytes=PIECES, share=st.floats(0, 1))
    def test_unpin_gives_back_the_same_pieces(
        self, saved: tuple[Checkpoint, Layout], piece_bytes: int, share: float
    ) -> None:
        store = packed(saved, piece_bytes)
        driver = Driver(limit=share * store.nbytes)
        first = store.pin(driver.pin)
        store.unpin(driver.unpin)
        assert not driver.locked
        store.unpin(driver.unpin)
        assert store.pin(driver.pin) == first

    def test_pinning_goes_on_where_it_was_refused(self, saved: tuple[Checkpoint, Layout]) -> None:
        store = packed(saved, PAGE_BYTES)
        driver = Driver(limit=store.nbytes / 2)
        assert 0 < store.pin(driver.pin).n_bytes < store.nbytes
        refused = driver.offered[-1]
        driver.limit, driver.offered = store.nbytes, []
        assert store.pin(driver.pin).n_bytes == store.nbytes
        assert driver.offered[0] == refused
        store.unpin(driver.unpin)
        assert not driver.locked

    def test_an_error_leaves_what_can_be_undone(self, saved: tuple[Checkpoint, Layout]) -> None:
        store, driver = packed(saved, PAGE_BYTES), Driver()

        def broken(memory: Tensor) -> bool:
            if len(driver.locked) == 3:
                raise OSError("gone")
            return driver.pin(memory)

        with pytest.raises(OSError, match="gone"):
            store.pin(broken)
        store.unpin(driver.unpin)
        assert not driver.locked

    def test_nothing_moves(self, saved: tuple[Checkpoint, Layout]) -> None:
        store, driver = packed(saved, PAGE_BYTES), Driver()
        before = {key: (store.block(*key).data_ptr(), store.block(*key).clone()) for key in EXPERTS}
        store.pin(driver.pin)
        for key, (address, content) in before.items():
            assert store.block(*key).data_ptr() == address
            assert torch.equal(store.block(*key), content)

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_only_what_is_not_locked_is_worth_a_warning(
        self, saved: tuple[Checkpoint, Layout], share: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = packed(saved, PAGE_BYTES)
        with caplog.at_level(logging.WARNING, logger="fiddler"):
            store.pin(Driver(limit=share * store.nbytes).pin)
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == (share < 1)
        assert all(word in message for message in messages for word in ("staging ring", "ulimit -l", "memlock"))


def test_the_pieces_hold_what_the_checkpoint_does(saved: tuple[Checkpoint, Layout]) -> None:
    whole, pieces = packed(saved), packed(saved, PAGE_BYTES)
    for layer, expert in EXPERTS:
        for store in (whole, pieces):
            weights = store.weights(layer, expert)
            assert torch.equal(weights.up[0], saved[0].tensor(f"{layer}.up")[expert])
            assert torch.equal(weights.down, saved[0].tensor(f"{layer}.down")[expert])
    assert pieces.nbytes == whole.nbytes == sum(whole.block(*key).nbytes for key in EXPERTS)
