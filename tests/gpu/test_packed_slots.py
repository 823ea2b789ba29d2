"""Quantised experts on slots: each path against one expert at a time, and what is decoded against the reference."""

import logging
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fiddler.devices.formula import DTYPES
from fiddler.formats.packed import Code
from fiddler.gpu import scratch
from fiddler.gpu import slots as slot_experts
from fiddler.gpu.scratch import by_torch, scratch_bytes
from fiddler.gpu.slots import FEW_ROWS, Ability, Method, SlotExperts
from fiddler.gpu.stack import PackedStack
from tests.gpu.quantised import BLOCKS, IN_BLOCKS, QUANTISATIONS, WHOLE, Quantisation, every_block, in_slots
from tests.gpu.test_slots import (
    ADA,
    DEVICE,
    GATED,
    HOPPER,
    KINDS,
    TOLERANCE,
    Kind,
    Sizes,
    random_visits,
)

PLAIN = [kind for kind in KINDS if not kind.transposed]


@pytest.fixture(autouse=True)
def _same_values() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("path", ["loop", "grouped"])
@pytest.mark.parametrize("quantisation", QUANTISATIONS, ids=str)
@torch.inference_mode()
def test_every_code_equals_one_expert_at_a_time(quantisation: Quantisation, path: Method) -> None:
    kind = PLAIN[QUANTISATIONS.index(quantisation) % len(PLAIN)]
    in_slots(quantisation, kind, Sizes(24, 16), torch.bfloat16).check(path, [1, 0, 4, 0, 2])


@pytest.mark.parametrize("path", ["loop", "grouped"])
@pytest.mark.parametrize("quantisation", IN_BLOCKS, ids=str)
@torch.inference_mode()
def test_every_type_of_block_equals_one_expert_at_a_time(quantisation: Quantisation, path: Method) -> None:
    kind, sizes = PLAIN[IN_BLOCKS.index(quantisation)], Sizes(512, 256)
    layer = in_slots(quantisation, kind, sizes, torch.bfloat16)
    assert all(isinstance(matrix, PackedStack) for matrix in (*layer.stack.up, layer.stack.down))
    layer.check(path, [1, 0, 4, 0, 2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", PLAIN, ids=str)
@torch.inference_mode()
def test_every_kind_equals_one_expert_at_a_time(kind: Kind, dtype: torch.dtype) -> None:
    quantisation = QUANTISATIONS[PLAIN.index(kind) % len(QUANTISATIONS)]
    in_slots(quantisation, kind, Sizes(13, 9), dtype).check("loop", [1, 0, 4, 0, 2])


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_the_sizes_blocks_and_groups(data: st.DataObject) -> None:
    sizes = Sizes(
        hidden=data.draw(st.integers(1, 33)),
        inner=data.draw(st.integers(1, 33)),
        n_slots=data.draw(st.integers(1, 9)),
        top_k=data.draw(st.integers(1, 5)),
    )
    counts = data.draw(st.lists(st.sampled_from((0, 0, 1, 2, 17)), min_size=sizes.n_slots, max_size=sizes.n_slots))
    held = [slot for slot, count in enumerate(counts) if count]
    drawn = data.draw(st.sampled_from(QUANTISATIONS))
    quantisation = Quantisation(drawn.code, drawn.scales, drawn.zeros, data.draw(st.sampled_from(BLOCKS)))
    kind, dtype = data.draw(st.sampled_from(PLAIN)), data.draw(st.sampled_from(list(TOLERANCE)))
    in_slots(quantisation, kind, sizes, dtype, held).check("loop", counts)


@pytest.mark.parametrize("most", [0, 700, 1 << 20])
def test_the_scratch_holds_as_many_experts_as_fit(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def watched(matrix: PackedStack, slots: Tensor, known: Sequence[int], dtype: torch.dtype) -> Tensor:
        dense = by_torch(matrix, slots, known, dtype)
        made.append(dense.nbytes)
        return dense

    monkeypatch.setattr(scratch, "SCRATCH_BYTES", most)
    monkeypatch.setattr("fiddler.gpu.slots.by_torch", watched)
    layer = in_slots(Quantisation(Code.INT4, torch.float32), PLAIN[0], Sizes(16, 8), torch.bfloat16)
    layer.check("grouped", [2, 0, 3, 1, 5])
    assert made
    assert max(made) <= max(most, 16 * 16 * 2)
    assert len(made) == {0: 8, 700: 8, 1 << 20: 2}[most]


def test_the_scratch_is_counted_by_the_largest_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Quantisation(Code.FP8, torch.float32).expert(PLAIN[0], Sizes(32, 8))
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 100)
    assert scratch_bytes(weights, 9, torch.bfloat16, kernels=True) == 32 * 16 * 2
    assert scratch_bytes(weights, 9, torch.bfloat16, kernels=False) > 32 * 16 * scratch.TORCH_BYTES
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 1 << 20)
    assert scratch_bytes(weights, 9, torch.bfloat16, kernels=True) == 9 * 32 * 16 * 2
    plain = in_slots(Quantisation(Code.FP8, torch.float32), PLAIN[0], Sizes(32, 8), torch.float32).experts[0]
    assert scratch_bytes(plain, 9, torch.bfloat16, kernels=False) == 0


def test_a_stack_has_the_matrices_of_its_slots() -> None:
    cases = [(*case, Sizes(13, 8)) for case in every_block(GATED["swiglu"])]
    cases += [(each, Kind(GATED["swiglu"], "swiglu"), Sizes(512, 256)) for each in IN_BLOCKS]
    for quantisation, kind, sizes in cases:
        layer = in_slots(quantisation, kind, sizes, torch.float32)
        for slot, expert in enumerate(layer.experts):
            for stacked, plain in zip((*layer.stack.up, layer.stack.down), expert.parts, strict=False):
                assert isinstance(stacked, PackedStack)
                assert stacked.shape == (layer.sizes.n_slots, *plain.shape)
                assert torch.equal(stacked.dense(slot, torch.float32), plain.to(stacked.codes.device))


@pytest.mark.parametrize("quantisation", IN_BLOCKS, ids=str)
def test_halves_of_rows_of_blocks(quantisation: Quantisation) -> None:
    layer = in_slots(quantisation, Kind(GATED["swiglu"], "swiglu"), Sizes(256, 7), torch.float32)
    assert layer.stack.twins is not None
    for (half, _), own in zip(layer.stack.twins, layer.experts[2].up[0].chunk(2), strict=True):
        assert isinstance(half, PackedStack)
        assert torch.equal(half.dense(2, torch.float32).cpu(), own)


@pytest.mark.parametrize("block", [(1, 4), (4, 4), (WHOLE, WHOLE), (8, 4)])
def test_halves_of_rows_have_their_own_blocks(block: tuple[int, int]) -> None:
    kind = Kind(GATED["swiglu"], "swiglu")
    layer = in_slots(Quantisation(Code.UINT8, torch.float16, True, block), kind, Sizes(12, 12), torch.float32)
    (up,) = layer.stack.up
    assert isinstance(up, PackedStack)
    halves = up.halves()
    if block == (8, 4):  # 12 rows are no whole number of blocks
        assert halves is None
        return
    assert halves is not None
    assert halves[0].outline == halves[1].outline
    for half, own in zip(halves, layer.experts[2].up[0].chunk(2), strict=True):
        assert torch.equal(half.dense(2, torch.float32).cpu(), own)


class TestFallback:
    """Many rows on a GPU that Triton runs on: its kernel decodes, or torch does when that has failed."""

    def run(self, monkeypatch: pytest.MonkeyPatch, kernels: Any, ability: Ability, n_runs: int = 1) -> None:
        monkeypatch.setattr(slot_experts, "ability_of", lambda device: ability)
        monkeypatch.setitem(sys.modules, "fiddler.gpu.triton_decode", kernels)
        layer = in_slots(Quantisation(Code.FP8, torch.float32), PLAIN[0], Sizes(16, 8), torch.bfloat16)
        experts = SlotExperts(lambda _: layer.stack, (layer.kind.formula,))
        visits = random_visits([FEW_ROWS + 1, 2, 0, 0, 1], 2)
        hidden = torch.randn(visits.n_rows, 16, device=DEVICE).bfloat16()
        for _ in range(n_runs):
            out = torch.zeros(visits.n_rows * 2, 16, device=DEVICE).bfloat16()
            experts.run(0, visits, hidden, out)
            expected = layer.reference(visits, hidden, out)
            assert (out.double() - expected).abs().max() <= TOLERANCE[torch.bfloat16] * expected.abs().max()

    @pytest.mark.parametrize("ability", [HOPPER, ADA], ids=["grouped", "loop"])
    def test_triton_decodes_for_many_rows(self, ability: Ability, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[list[int]] = []

        def decode(matrix: PackedStack, slots: Tensor, known: Sequence[int], dtype: torch.dtype) -> Tensor:
            assert slots.tolist() == list(known)
            made.append(slots.tolist())
            return by_torch(matrix, slots, known, dtype)

        self.run(monkeypatch, SimpleNamespace(decode=decode), ability)
        assert [slot for slots in made[::2] for slot in slots if slot in (0, 1, 4)] == [0, 1, 4]
        assert all(len(slots) == 1 for slots in made) == (ability is ADA)

    def test_without_triton_torch_does_and_says_so_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "fiddler"):
            self.run(monkeypatch, None, HOPPER, n_runs=3)
        (record,) = caplog.records
        assert "without Triton: ModuleNotFoundError" in record.getMessage()
