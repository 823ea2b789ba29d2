"""The packed store: the mapped store's bytes, in one aligned block an expert and in memory once."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fiddler.config import EngineConfig
from fiddler.errors import CheckpointError
from fiddler.models.loaded import load
from fiddler.store.blocks import BlockStore
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import INDEX, SINGLE
from fiddler.store.layout import ALIGNMENT, BlockLayout
from fiddler.store.mapped import ExpertParts, Layout, MappedStore, Select, View
from fiddler.types import ExpertWeights
from tests.support.tiny import N_EXPERTS, N_LAYERS, save_tiny

MIB = 1 << 20
KINDS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPERTS = [(layer, expert) for layer in range(N_LAYERS) for expert in range(N_EXPERTS)]


@dataclass(frozen=True)
class Both:
    """A checkpoint's two stores."""

    mapped: MappedStore
    packed: BlockStore


def both(folder: Path, dtype: Any = "auto") -> Both:
    mapped: Any = load(folder, EngineConfig(dtype=dtype)).weights.__self__  # type: ignore[attr-defined]
    return Both(mapped, BlockStore(mapped.checkpoint, mapped.layout, mapped.dtype))


@pytest.fixture(scope="module", params=[(kind, dtype) for kind in KINDS for dtype in DTYPES], ids="-".join)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, dtype = request.param
    return save_tiny(tmp_path_factory.mktemp(kind), kind, dtype=DTYPES[dtype])


def tensors_of(weights: ExpertWeights) -> list[Tensor]:
    down_bias = [] if weights.down_bias is None else [weights.down_bias]
    return [*weights.up, weights.down, *weights.up_bias, *down_bias]


def assert_same(ours: ExpertWeights, theirs: ExpertWeights) -> None:
    assert (len(ours.up), len(ours.up_bias)) == (len(theirs.up), len(theirs.up_bias))
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


class TestBlockLayout:
    @given(
        shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        turned=st.booleans(),
        step=st.integers(1, 2),
    )
    def test_any_parts_come_back_from_aligned_places(
        self, shapes: list[tuple[int, int]], dtype: torch.dtype, turned: bool, step: int
    ) -> None:
        matrices = [torch.rand(rows, cols * step)[:, ::step].to(dtype) for rows, cols in shapes]
        matrices = [matrix.t() for matrix in matrices] if turned else matrices
        weights = ExpertWeights(tuple(matrices[1:]), matrices[0], down_bias=torch.rand(5).to(dtype))
        layout = BlockLayout.of(weights)
        block = torch.empty(layout.nbytes, dtype=torch.uint8)
        layout.write(weights, block)
        made = layout.views(block)
        assert_same(made, weights)
        assert layout.nbytes % ALIGNMENT == 0
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors_of(made))
        ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors_of(made))
        assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
        assert ranges[-1][1] <= block.data_ptr() + layout.nbytes

    def test_a_turned_part_stays_turned(self) -> None:
        weights = ExpertWeights((torch.rand(4, 6).t(),), torch.rand(4, 6))
        made = BlockLayout.of(weights).views(torch.empty(1024, dtype=torch.uint8))
        assert made.up[0].stride() == (1, 6)
        assert made.down.stride() == (6, 1)

    def test_an_interleaved_part_is_stored_without_its_gaps(self) -> None:
        big = torch.rand(6, 8)
        weights = ExpertWeights((big[::2], big[:, ::2].t()), big)
        rows, columns = BlockLayout.of(weights).views(torch.empty(1024, dtype=torch.uint8)).up
        assert rows.stride() == (8, 1)
        assert columns.stride() == (1, 4)

    @pytest.mark.parametrize("joined_first", [True, False])
    def test_gate_and_up_may_be_joined_in_one_of_two_experts_only(self, joined_first: bool) -> None:
        ups, down, biases = torch.rand(8, 6), torch.rand(6, 4), torch.rand(8)
        joined = ExpertWeights((ups,), down, (biases,))
        apart = ExpertWeights((ups[:4], ups[4:]), down, (biases[:4], biases[4:]))
        first, second = (joined, apart) if joined_first else (apart, joined)
        layout = BlockLayout.of(first)
        block = torch.empty(layout.nbytes, dtype=torch.uint8)
        layout.write(second, block)
        assert_same(layout.views(block), first)

    @pytest.mark.parametrize(
        "other",
        [
            ExpertWeights((torch.rand(1, 6),), torch.rand(6, 4)),  # would broadcast
            ExpertWeights((torch.rand(4, 6), torch.rand(4, 5)), torch.rand(6, 4)),
            ExpertWeights((torch.rand(8, 6),), torch.rand(6, 5)),
            ExpertWeights((torch.rand(8, 6),), torch.rand(6, 4), (torch.rand(8),)),
        ],
        ids=["fewer-rows", "other-width", "down", "bias"],
    )
    def test_other_shapes_are_refused_unwritten(self, other: ExpertWeights) -> None:
        layout = BlockLayout.of(ExpertWeights((torch.rand(8, 6),), torch.rand(6, 4)))
        block = torch.full((layout.nbytes,), 7, dtype=torch.uint8)
        with pytest.raises(ValueError, match="where the layout has"):
            layout.write(other, block)
        assert bool((block == 7).all())


class TestBlockStore:
    @pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
    def test_every_expert_is_the_mapped_one(self, saved: Path, dtype: str) -> None:
        stores = both(saved, dtype)
        for key in EXPERTS:
            weights = stores.packed.weights(*key)
            assert_same(weights, stores.mapped.weights(*key))
            assert stores.packed.weights(*key) is weights
            block = stores.packed.block(*key)
            for tensor in tensors_of(weights):
                assert tensor.data_ptr() % ALIGNMENT == 0
                assert block.data_ptr() <= tensor.data_ptr() < block.data_ptr() + len(block)

    def test_says_how_large_it_is(self, saved: Path) -> None:
        packed = both(saved).packed
        assert packed.block_bytes == packed.layout(0).nbytes == len(packed.block(0, 0))
        assert packed.nbytes == packed.block_bytes * len(EXPERTS)
        assert packed.block_bytes >= packed.weights(0, 0).nbytes

    def test_layers_alike_share_a_layout_and_others_do_not(self, tmp_path: Path) -> None:
        tensors = {f"{name}{i}": torch.rand(i, 4) for i in (2, 3) for name in ("up", "down")}
        parts = {i: ExpertParts((View(f"up{i}"),), View(f"down{i}")) for i in (2, 3)}
        packed = single(tmp_path, tensors, (parts[2],), (parts[3],) * 2, (parts[2],))
        assert packed.layout(0) is packed.layout(2)
        assert packed.layout(0) != packed.layout(1)
        assert packed.block_bytes == packed.layout(1).nbytes
        assert torch.equal(packed.weights(1, 1).up[0], tensors["up3"])

    def test_a_shard_may_end_between_gate_and_up(self, tmp_path: Path) -> None:
        names = [f"{e}.{part}" for e in range(3) for part in ("gate", "up")]
        tensors = {name: torch.rand(4, 8) for name in names}
        save_file({n: tensors[n] for n in names[:3]}, tmp_path / "one.safetensors")
        save_file({n: tensors[n] for n in names[3:]} | {"down": torch.rand(8, 4)}, tmp_path / "two.safetensors")
        shards = dict.fromkeys(names[:3], "one") | dict.fromkeys((*names[3:], "down"), "two")
        pairs = ", ".join(f'"{name}": "{shard}.safetensors"' for name, shard in shards.items())
        (tmp_path / INDEX).write_text(f'{{"weight_map": {{{pairs}}}}}')
        experts = tuple(ExpertParts((View(f"{e}.gate"), View(f"{e}.up")), View("down")) for e in range(3))
        checkpoint, layout = Checkpoint.open(tmp_path), Layout((experts,))
        mapped = MappedStore(checkpoint, layout, torch.float32)
        assert [len(mapped.weights(0, e).up) for e in range(3)] == [1, 2, 1]
        packed = BlockStore(checkpoint, layout, torch.float32)
        for e in range(3):
            (up,) = packed.weights(0, e).up
            assert torch.equal(up, torch.cat([tensors[f"{e}.gate"], tensors[f"{e}.up"]]))

    def test_the_checkpoint_is_not_needed_afterwards(self, tmp_path: Path) -> None:
        tensors = {"up": torch.rand(8, 4), "down": torch.rand(4, 8)}
        packed = single(tmp_path, tensors, (ExpertParts((View("up"),), View("down")),))
        (tmp_path / SINGLE).write_bytes(b"")
        assert torch.equal(packed.weights(0, 0).up[0], tensors["up"])

    @pytest.mark.parametrize(
        ("broken", "message"), [("lost", "'lost' is not in"), ("int", "is I32"), ("small", "expert 1 of layer 0")]
    )
    def test_what_cannot_be_read_is_an_error_of_the_checkpoint(
        self, tmp_path: Path, broken: str, message: str
    ) -> None:
        tensors = {
            "up": torch.rand(8, 4),
            "down": torch.rand(4, 8),
            "int": torch.zeros(8, 4, dtype=torch.int32),
            "small": torch.rand(1, 4),
        }
        experts = tuple(ExpertParts((View(up),), View("down")) for up in ("up", broken))
        with pytest.raises(CheckpointError, match=message):
            single(tmp_path, tensors, experts)


def single(folder: Path, tensors: dict[str, Tensor], *layers: tuple[ExpertParts, ...]) -> BlockStore:
    save_file(tensors, folder / SINGLE)
    return BlockStore(Checkpoint.open(folder), Layout(layers), torch.float32)


def resident() -> tuple[int, int]:
    """Bytes of this process that are in memory: its own, and those of mapped checkpoints."""
    own = mapped = 0
    file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, *values = line.split()
        if not field.endswith(":"):  # the head of a mapping
            file = line.endswith(".safetensors")
        elif field == "Rss:" and file:
            mapped += int(values[0]) << 10
        elif field == "Anonymous:":
            own += int(values[0]) << 10
    return own, mapped


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc")
class TestMemory:
    N, ROWS = 16, 1024
    EXPERT = 3 * MIB  # gate, up and down [ROWS, 256] in fp32
    # Linux may map the 2 MiB around a byte that is touched.
    FEW = 4 * EXPERT

    @pytest.fixture(params=["fused", "apart"])
    def opened(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, Layout]:
        shape = (self.ROWS, 256)
        if request.param == "fused":
            tensors = {"up": torch.rand(self.N, 2 * self.ROWS, 256), "down": torch.rand(self.N, *shape)}
            steps = [(Select(e),) for e in range(self.N)]
            parts = [ExpertParts((View("up", s),), View("down", s)) for s in steps]
        else:
            tensors = {f"{e}.{p}": torch.rand(shape) for e in range(self.N) for p in ("w1", "w2", "w3")}
            parts = [ExpertParts((View(f"{e}.w1"), View(f"{e}.w3")), View(f"{e}.w2")) for e in range(self.N)]
        save_file(tensors, tmp_path / SINGLE)
        return Checkpoint.open(tmp_path), Layout((tuple(parts),))

    @pytest.fixture
    def peaks(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
        """How far own and mapped memory had grown when they were largest: just before pages are released."""
        before = resident()
        seen = [before]
        release = Checkpoint.release

        def watched(checkpoint: Checkpoint, name: str) -> None:
            seen.append(resident())
            release(checkpoint, name)

        monkeypatch.setattr(Checkpoint, "release", watched)
        return lambda: (max(s[0] for s in seen) - before[0], max(s[1] for s in seen) - before[1])

    def test_a_mapped_store_that_ran_is_resident(self, opened: tuple[Checkpoint, Layout]) -> None:
        _, before = resident()
        store = MappedStore(*opened, torch.float32)
        for e in range(self.N):
            sum(float(t.sum()) for t in tensors_of(store.weights(0, e)))
        assert resident()[1] - before > 0.9 * self.N * self.EXPERT

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_packing_holds_one_copy_and_few_experts_more(
        self, opened: tuple[Checkpoint, Layout], peaks: Callable[[], tuple[int, int]], dtype: torch.dtype
    ) -> None:
        _, before = resident()
        store = BlockStore(*opened, dtype)
        own, mapped = peaks()
        assert store.nbytes == self.N * self.EXPERT * dtype.itemsize // 4
        assert own < store.nbytes + self.FEW
        assert 0 < mapped < self.FEW
        assert resident()[1] - before < self.FEW

    def test_a_converted_expert_is_dropped_before_the_next(
        self, opened: tuple[Checkpoint, Layout], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights, made, alive = MappedStore.weights, [], []

        def watched(store: MappedStore, layer: int, expert: int) -> ExpertWeights:
            alive.append(sum(tensor() is not None for tensor in made))
            found = weights(store, layer, expert)
            made.extend(ref(tensor) for tensor in tensors_of(found))
            return found

        monkeypatch.setattr(MappedStore, "weights", watched)
        store = BlockStore(*opened, torch.bfloat16)
        assert len(alive) == self.N + 1
        assert set(alive) == {0}
        assert store.weights(0, 0).down.dtype == torch.bfloat16
