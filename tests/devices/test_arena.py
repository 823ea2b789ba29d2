"""The arena: blocks in slots, and the same bits whether weights are mapped, packed or in a slot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu

from fiddler.config import EngineConfig
from fiddler.devices.arena import Arena
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.devices.formula import ExpertFormula
from fiddler.devices.kernels import BUCKETS, KernelName, Kernels, shape_key
from fiddler.devices.native import native
from fiddler.models.loaded import load
from fiddler.scheduler.routing import Load
from fiddler.store.blocks import BlockStore
from fiddler.store.checkpoint import Checkpoint
from fiddler.store.folder import SINGLE
from fiddler.store.layout import ALIGNMENT, BlockLayout
from fiddler.store.mapped import ExpertParts, Layout, MappedStore, View
from fiddler.types import ExpertWeights
from tests.support.tiny import N_EXPERTS, N_LAYERS, save_tiny

WEIGHTS = ExpertWeights((torch.rand(4, 6),), torch.rand(6, 2), down_bias=torch.rand(6))
OTHER = ExpertWeights((torch.rand(3, 5).t(),), torch.rand(3, 2))
LAYOUT, OTHER_LAYOUT = BlockLayout.of(WEIGHTS), BlockLayout.of(OTHER)
ROWS = (1, 2, 3, 5, 8, 17)


def block_of(weights: ExpertWeights, layout: BlockLayout) -> Tensor:
    block = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.write(weights, block)
    return block


class TestArena:
    def test_every_slot_holds_its_own_block(self) -> None:
        arena = Arena(3, LAYOUT.nbytes)
        for slot in range(3):
            arena.write(
                slot, block_of(ExpertWeights(WEIGHTS.up, WEIGHTS.down + slot, (), WEIGHTS.down_bias), LAYOUT)
            )
        for slot in range(3):
            assert torch.equal(arena.views(slot, LAYOUT).down, WEIGHTS.down + slot)
        arena.check()

    def test_views_are_kept_and_show_what_is_written_later(self) -> None:
        arena = Arena(1, LAYOUT.nbytes)
        views = arena.views(0, LAYOUT)
        arena.write(0, block_of(WEIGHTS, LAYOUT))
        assert arena.views(0, LAYOUT) is views
        assert torch.equal(views.up[0], WEIGHTS.up[0])
        assert views.down_bias is not None
        assert WEIGHTS.down_bias is not None
        assert torch.equal(views.down_bias, WEIGHTS.down_bias)

    def test_a_slot_takes_smaller_blocks_of_other_layouts(self) -> None:
        arena = Arena(2, max(LAYOUT.nbytes, OTHER_LAYOUT.nbytes))
        arena.write(1, block_of(WEIGHTS, LAYOUT))
        arena.views(1, LAYOUT)
        arena.write(1, block_of(OTHER, OTHER_LAYOUT))
        views = arena.views(1, OTHER_LAYOUT)
        assert torch.equal(views.up[0], OTHER.up[0])
        assert views.up[0].stride() == OTHER.up[0].stride()
        arena.check()

    def test_a_write_stays_in_its_slot(self) -> None:
        arena = Arena(3, LAYOUT.nbytes)
        for slot in range(3):
            arena.write(slot, torch.full((LAYOUT.nbytes,), slot, dtype=torch.uint8))
        arena.write(1, torch.full((LAYOUT.nbytes,), 9, dtype=torch.uint8))
        blocks = [arena.views(slot, _Whole()).down for slot in range(3)]
        assert [set(block.tolist()) for block in blocks] == [{0}, {9}, {2}]

    @pytest.mark.parametrize("slot", [-1, 2])
    def test_a_slot_that_does_not_exist_is_an_error(self, slot: int) -> None:
        arena = Arena(2, LAYOUT.nbytes)
        with pytest.raises(IndexError, match=f"slot {slot} of 2"):
            arena.write(slot, block_of(WEIGHTS, LAYOUT))
        with pytest.raises(IndexError, match=f"slot {slot} of 2"):
            arena.views(slot, LAYOUT)

    def test_a_block_larger_than_a_slot_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            Arena(1, ALIGNMENT).write(0, block_of(WEIGHTS, LAYOUT))

    def test_unaligned_slots_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="not aligned"):
            Arena(2, LAYOUT.nbytes + 8)

    def test_an_arena_may_have_no_slots(self) -> None:
        arena = Arena(0, LAYOUT.nbytes)
        assert (arena.n_slots, arena.slot_bytes) == (0, LAYOUT.nbytes)
        arena.check()

    def test_threads_in_and_out_of_inference_mode_may_write(self) -> None:
        with torch.inference_mode():
            arena = Arena(1, LAYOUT.nbytes)
            arena.write(0, block_of(OTHER, OTHER_LAYOUT))
            views = arena.views(0, LAYOUT)
        arena.write(0, block_of(WEIGHTS, LAYOUT))
        assert torch.equal(views.down, WEIGHTS.down)

    def test_check_finds_views_of_another_slot(self) -> None:
        arena = Arena(2, LAYOUT.nbytes)
        arena._views[0] = LAYOUT, arena.views(1, LAYOUT)
        with pytest.raises(AssertionError, match="slot 0"):
            arena.check()


class _Whole:
    """A layout of one part: all bytes."""

    def views(self, block: Tensor) -> ExpertWeights:
        return ExpertWeights((), block)


@dataclass(frozen=True)
class Places:
    """One layer's experts in the three places they can be."""

    mapped: MappedStore
    packed: BlockStore
    formulas: tuple[ExpertFormula, ...]

    @classmethod
    def of(cls, mapped: MappedStore, formulas: tuple[ExpertFormula, ...]) -> "Places":
        return cls(mapped, BlockStore(mapped.checkpoint, mapped.layout, mapped.dtype), formulas)

    def outputs(self, layer: int, n_rows: int, kernel: KernelName) -> list[Tensor]:
        """What every expert of a layer makes of the same random rows `[n_rows, H]`: mapped, packed, in a slot."""
        n_experts = self.mapped.layout.n_experts[layer]
        arena, layout = Arena(n_experts, self.packed.block_bytes), self.packed.layout(layer)
        for expert in range(n_experts):
            arena.write(n_experts - 1 - expert, self.packed.block(layer, expert))
        arena.check()
        sample = self.mapped.weights(layer, 0)
        keys = [shape_key(weight) for weight in (*sample.up, sample.down)]
        kernels = Kernels({(key, bucket): kernel for key in keys for bucket in BUCKETS}, native())
        rows = torch.randn(n_experts * n_rows, sample.down.shape[0]).to(sample.down.dtype)
        loads = tuple(Load(e, e * n_rows, (e + 1) * n_rows) for e in range(n_experts))
        places = (
            self.mapped.weights,
            self.packed.weights,
            lambda _, expert: arena.views(n_experts - 1 - expert, layout),
        )
        return [self.run(CpuDevice(weights, self.formulas, kernels), layer, loads, rows) for weights in places]

    def run(self, device: CpuDevice, layer: int, loads: tuple[Load, ...], rows: Tensor) -> Tensor:
        out = empty_results(rows)
        device.run(layer, loads, [device.weights(layer, load.expert) for load in loads], rows, out)
        return out


@pytest.fixture(
    scope="module",
    params=[
        (kind, dtype) for kind in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss") for dtype in ("float32", "bfloat16")
    ],
    ids="-".join,
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Places:
    kind, dtype = request.param
    folder = save_tiny(tmp_path_factory.mktemp(kind), kind, dtype=getattr(torch, dtype))
    model = load(folder, EngineConfig())
    mapped: Any = model.weights.__self__  # type: ignore[attr-defined]
    assert set(mapped.layout.n_experts) == {N_EXPERTS}
    return Places.of(mapped, model.formulas)


KERNELS: list[KernelName] = ["linear", "rows_last", "vector", *(["native"] if native() is not None else [])]  # type: ignore[list-item]


class TestSameBits:
    @pytest.mark.parametrize("kernel", KERNELS)
    @torch.inference_mode()
    def test_wherever_the_weights_are(self, tiny: Places, kernel: KernelName) -> None:
        for n_rows in ROWS if kernel != "vector" else (1,):
            for layer in range(N_LAYERS):
                mapped, packed, slot = tiny.outputs(layer, n_rows, kernel)
                assert torch.equal(packed, slot), f"{n_rows} rows"
                assert torch.equal(mapped, packed), f"{n_rows} rows"

    @pytest.mark.parametrize("pad", [1, 3, 12, 31])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @torch.inference_mode()
    def test_however_the_file_is_aligned(self, tmp_path: Path, dtype: torch.dtype, pad: int) -> None:
        hidden, inner = 256, 96  # large enough for AMX tiles and for MKL's blocking
        tensors = {"a": torch.zeros(pad), "down": torch.randn(hidden, inner), "up": torch.randn(2 * inner, hidden)}
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / SINGLE)
        layout = Layout(((ExpertParts((View("up"),), View("down")),),))
        mapped = MappedStore(Checkpoint.open(tmp_path), layout, dtype)
        places = Places.of(mapped, (ExpertFormula(gated=True, activation=silu),))
        assert mapped.checkpoint.tensor("up").data_ptr() % ALIGNMENT
        for kernel in set(KERNELS) - {"vector"}:
            for n_rows in ROWS:
                outputs = places.outputs(0, n_rows, kernel)
                assert torch.equal(outputs[0], outputs[1])
                assert torch.equal(outputs[1], outputs[2])
