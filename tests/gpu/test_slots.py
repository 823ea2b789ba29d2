"""Experts on slots: each path against one expert at a time, with everything that no visit asks for left out."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fiddler.devices.formula import DTYPES, ExpertFormula, run_expert
from fiddler.devices.kernels import linear
from fiddler.gpu import slots as slot_experts
from fiddler.gpu.slots import FEW_ROWS, Ability, Method, SlotExperts, pick
from fiddler.gpu.stack import Stack
from fiddler.gpu.visits import Visits, windows
from fiddler.store.layout import ALIGNMENT, BlockLayout, Part
from fiddler.types import ExpertWeights
from tests.support.covering import covering

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest error, as a share of the largest value, or of one where terms cancel: some 2^-24, 2^-11 and 2^-8."""
UNTOUCHED = 77.0
LOGGER = "fiddler"


def own_gate(up: Tensor) -> Tensor:
    """A gate as gpt-oss has it: interleaved and clamped."""
    gate, up = up[..., ::2].clamp(max=0.7), up[..., 1::2].clamp(-0.7, 0.7)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def norm(y: Tensor) -> Tensor:
    """A norm that does not blow up the error of a small value."""
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1.0)


GATED: dict[str, ExpertFormula] = {
    "swiglu": ExpertFormula(gated=True, activation=F.silu),
    "gelu": ExpertFormula(gated=True, activation=F.gelu),
    "own": ExpertFormula(gated=True, activation=None, gate=own_gate),
}
UNGATED = ExpertFormula(gated=False, activation=lambda x: F.relu(x).square())


@dataclass(frozen=True)
class Kind:
    """What varies between experts."""

    formula: ExpertFormula
    name: str
    split: bool = False
    bias: bool = False
    transposed: bool = False

    def __str__(self) -> str:
        on = [name for name in ("split", "bias", "transposed") if getattr(self, name)]
        return "+".join([self.name, *on, *(["norm"] if self.formula.post_norm else [])])


def kinds_with(*axes: Iterable[Any], strength: int) -> list[tuple[Any, ...]]:
    """Return kinds beside values of other axes: any `strength` of formula, flags and axes together."""
    both = (False, True)
    cases = covering(
        (*GATED, "ungated"),
        *(both,) * 4,
        *axes,
        strength=strength,
        where=lambda name, split, *_: not (name == "ungated" and split),
    )
    return [(kind_of(name, *flags[:4]), *flags[4:]) for name, *flags in cases]


def kind_of(name: str, split: bool, bias: bool, transposed: bool, normed: bool) -> Kind:
    plain = GATED.get(name, UNGATED)
    formula = ExpertFormula(plain.gated, plain.activation, plain.gate, norm if normed else None)
    return Kind(formula, name, split, bias, transposed)


KINDS = [made for (made,) in kinds_with(strength=5)]
"""All of them."""


@dataclass(frozen=True)
class Sizes:
    hidden: int
    inner: int
    n_slots: int = 5
    top_k: int = 2


@dataclass(frozen=True)
class Layer:
    """One layer's experts in an arena whose other slots, and the gaps between blocks, hold nothing but NaNs."""

    kind: Kind
    sizes: Sizes
    dtype: torch.dtype
    experts: tuple[ExpertWeights, ...]
    stack: Stack

    @classmethod
    def of(cls, kind: Kind, sizes: Sizes, dtype: torch.dtype, held: Sequence[int] | None = None) -> "Layer":
        """Make random experts; `held` are the slots that hold one, all of them unless told."""
        experts = tuple(random_expert(kind, sizes, dtype) for _ in range(sizes.n_slots))
        layout = BlockLayout.of(experts[0])
        slots = torch.full((sizes.n_slots, layout.nbytes + ALIGNMENT), 0xFF, dtype=torch.uint8, device=DEVICE)
        for slot in range(sizes.n_slots) if held is None else held:
            layout.write(experts[slot], slots[slot])
        return cls(kind, sizes, dtype, experts, Stack.over(slots, layout))

    def check(self, path: Method, counts: Sequence[int]) -> None:
        """Run so many rows on each slot, at random positions, and compare each one with `run_expert`."""
        visits = random_visits(counts, self.sizes.top_k)
        n_tokens = -(-(visits.n_rows + 3) // self.sizes.top_k)
        hidden = torch.randn(n_tokens, self.sizes.hidden, device=DEVICE).to(self.dtype)
        out = torch.full((n_tokens * self.sizes.top_k, self.sizes.hidden), UNTOUCHED, device=DEVICE).to(self.dtype)
        SlotExperts(lambda _: self.stack, (self.kind.formula,), path=path).run(0, visits, hidden, out)
        expected = self.reference(visits, hidden, out)
        visited = visits.positions.long()
        others = torch.ones(len(out), dtype=torch.bool, device=DEVICE).index_fill_(0, visited, False)
        assert (out[others] == UNTOUCHED).all()
        if visits.n_rows:
            error = (out.double() - expected)[visited].abs().max()
            assert error <= TOLERANCE[self.dtype] * expected[visited].abs().max().clamp(min=1.0)

    def reference(self, visits: Visits, hidden: Tensor, out: Tensor) -> Tensor:
        """Return what `out` should be, in float64, each expert by itself."""
        expected = torch.zeros(out.shape, dtype=torch.float64, device=DEVICE)
        for slot, start, stop in visits.groups:
            positions = visits.positions[start:stop].long()
            x, weights = hidden[positions // visits.top_k].double(), exactly(self.experts[slot])
            expected[positions] = run_expert(self.kind.formula, weights, x, linear, linear)
        return expected


def exactly(weights: ExpertWeights) -> ExpertWeights:
    def double(part: Tensor) -> Tensor:
        return part.to(DEVICE).double()

    down_bias = None if weights.down_bias is None else double(weights.down_bias)
    return ExpertWeights(
        tuple(map(double, weights.up)), double(weights.down), tuple(map(double, weights.up_bias)), down_bias
    )


def random_expert(kind: Kind, sizes: Sizes, dtype: torch.dtype) -> ExpertWeights:
    def matrix(out: int, columns: int) -> Tensor:
        values = (torch.randn(out, columns) / columns**0.5).to(dtype)
        return values.t().contiguous().t() if kind.transposed else values

    hidden, inner = sizes.hidden, sizes.inner
    outs = (inner,) * 2 if kind.split else (2 * inner,) if kind.formula.gated else (inner,)
    biases = tuple(torch.randn(out).to(dtype) for out in outs) if kind.bias else ()
    down_bias = torch.randn(hidden).to(dtype) if kind.bias else None
    return ExpertWeights(tuple(matrix(out, hidden) for out in outs), matrix(hidden, inner), biases, down_bias)


def random_visits(counts: Sequence[int], top_k: int) -> Visits:
    """Return visits of so many rows by slot; slots without rows are groups too if their number is even."""
    n_rows = sum(counts)
    order = torch.randperm(-(-(n_rows + 3) // top_k) * top_k)[:n_rows]
    stops = list(accumulate(counts))
    groups = tuple(
        (slot, stop - count, stop)
        for slot, (count, stop) in enumerate(zip(counts, stops, strict=True))
        if count or slot % 2 == 0
    )
    positions = [position for _, start, stop in groups for position in sorted(order[start:stop].tolist())]

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return Visits(
        slots=on_device([slot for slot, _, _ in groups]),
        bounds=on_device([0, *(stop for _, _, stop in groups)]),
        positions=on_device(positions),
        most_rows=max(counts),
        n_rows=n_rows,
        top_k=top_k,
        groups=groups,
    )


@pytest.fixture(autouse=True)
def _same_values() -> None:
    torch.manual_seed(0)


class TestPaths:
    @pytest.mark.parametrize(("kind", "dtype"), kinds_with(DTYPES.values(), strength=2), ids=str)
    @torch.inference_mode()
    def test_loop_equals_one_expert_at_a_time(self, kind: Kind, dtype: torch.dtype) -> None:
        Layer.of(kind, Sizes(13, 9), dtype).check("loop", [1, 0, 4, 0, 2])

    @pytest.mark.parametrize(("kind", "dtype"), kinds_with(DTYPES.values(), strength=3), ids=str)
    @torch.inference_mode()
    def test_grouped_equals_one_expert_at_a_time(self, kind: Kind, dtype: torch.dtype) -> None:
        Layer.of(kind, Sizes(24, 16), dtype).check("grouped", [1, 0, 4, 0, 2])

    @pytest.mark.parametrize("path", ["loop", "grouped"])
    @settings(max_examples=40)
    @given(data=st.data())
    def test_whatever_the_sizes_and_groups(self, path: Method, data: st.DataObject) -> None:
        step = 1 if path == "loop" else 8  # a grouped matmul wants rows of 16 bytes
        sizes = Sizes(
            hidden=step * data.draw(st.integers(1, 6)),
            inner=step * data.draw(st.integers(1, 6)),
            n_slots=data.draw(st.integers(1, 9)),
            top_k=data.draw(st.integers(1, 5)),
        )
        counts = data.draw(
            st.lists(st.sampled_from((0, 0, 1, 2, 17)), min_size=sizes.n_slots, max_size=sizes.n_slots)
        )
        kind, dtype = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(list(TOLERANCE)))
        held = [slot for slot, count in enumerate(counts) if count]
        Layer.of(kind, sizes, dtype, held).check(path, counts)

    def test_grouped_takes_several_calls_for_many_slots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(slot_experts, "MOST_GROUPS", 3)
        counts = [0, 2, 0, 1, 3, 0, 0, 5, 1]
        for kind in (KINDS[0], KINDS[-1]):
            Layer.of(kind, Sizes(16, 8, n_slots=9), torch.bfloat16).check("grouped", counts)

    def test_auto_runs_on_a_cpu(self, caplog: pytest.LogCaptureFixture) -> None:
        Layer.of(KINDS[0], Sizes(8, 8), torch.float32).check("auto", [1, 2, 0, 0, 0])
        assert not caplog.records


def layout_of(up: Part, down: int | None = None) -> BlockLayout:
    """Lay out a matrix and another like it, in the same place unless told."""
    return BlockLayout((up,), replace(up, offset=up.offset if down is None else down), (), None, 128)


class TestStack:
    @pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1], next(kind for kind in KINDS if kind.split)], ids=str)
    def test_its_parts_are_views_of_every_slot(self, kind: Kind) -> None:
        sizes = Sizes(12, 10)
        expert = random_expert(kind, sizes, torch.bfloat16)
        layout = BlockLayout.of(expert)
        slots = torch.zeros(sizes.n_slots, layout.nbytes + ALIGNMENT, dtype=torch.uint8)
        stack = Stack.over(slots, layout)
        for slot in range(sizes.n_slots):
            layout.write(random_expert(kind, sizes, torch.bfloat16), slots[slot])
            for mine, there in zip(stack.of(slot).parts, layout.views(slots[slot]).parts, strict=True):
                assert torch.equal(mine, there)
                assert (mine.data_ptr(), mine.stride()) == (there.data_ptr(), there.stride())

    def test_part_of_a_larger_memory(self) -> None:
        memory = torch.zeros(6, 256, dtype=torch.uint8)
        slots = memory[2:, 64:192]  # rows apart, and not at the start of their memory
        stack = Stack.over(slots, layout_of(Part(0, (4, 3), torch.float32, False), 64))
        memory[3, 64:112].view(torch.float32).fill_(5)
        (up,) = stack.up
        assert isinstance(up, Tensor)
        assert up.shape == (4, 4, 3)
        assert up.amax((1, 2)).tolist() == [0, 5, 0, 0]

    @pytest.mark.parametrize("start", [-4, 8, 12])
    def test_a_part_beyond_a_slot_is_an_error(self, start: int) -> None:
        slots = torch.zeros(2, 128, dtype=torch.uint8)
        layout = layout_of(Part(start, (5, 6), torch.float32, False))
        if start == 8:
            assert Stack.over(slots, layout).down.shape == (2, 5, 6)
        else:
            with pytest.raises(ValueError, match="not in a slot of 128 bytes"):
                Stack.over(slots, layout)

    def test_unaligned_slots_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="not aligned to 4"):
            Stack.over(torch.zeros(2, 6, dtype=torch.uint8), layout_of(Part(0, (1, 1), torch.float32, False)))

    @pytest.mark.parametrize("sizes", [Sizes(16, 8), Sizes(16, 9), Sizes(16, 4), Sizes(12, 8)], ids=str)
    def test_knows_what_a_grouped_matmul_takes(self, sizes: Sizes) -> None:
        for kind in KINDS:
            aligned = Layer.of(kind, sizes, torch.bfloat16).stack.aligned
            assert aligned == (sizes.hidden % 8 == 0 == sizes.inner % 8)


HOPPER = Ability("cuda", (9, 0), triton=True)
ADA = Ability("cuda", (8, 9), triton=True)
TURING = Ability("cuda", (7, 5), triton=True)


class TestPick:
    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_few_rows_take_triton(self, dtype: torch.dtype) -> None:
        for ability, aligned in product((HOPPER, ADA), (True, False)):
            assert pick(1, dtype, ability, aligned) == pick(FEW_ROWS, dtype, ability, aligned) == "triton"

    def test_many_rows_are_grouped_where_that_does_not_wait(self) -> None:
        many = FEW_ROWS + 1
        assert pick(many, torch.bfloat16, HOPPER, aligned=True) == "grouped"
        assert pick(many, torch.bfloat16, HOPPER._replace(capability=(10, 0)), aligned=True) == "grouped"
        assert pick(many, torch.bfloat16, HOPPER, aligned=False) == "loop"
        assert pick(many, torch.float16, HOPPER, aligned=True) == "loop"
        assert pick(many, torch.bfloat16, ADA, aligned=True) == "loop"
        assert pick(many, torch.bfloat16, HOPPER._replace(capability=(12, 0)), aligned=True) == "loop"

    def test_without_triton_few_rows_are_like_many(self) -> None:
        assert pick(1, torch.bfloat16, HOPPER._replace(triton=False), aligned=True) == "grouped"
        assert pick(1, torch.bfloat16, ADA._replace(triton=False), aligned=True) == "loop"

    @pytest.mark.parametrize(
        "ability", [TURING, Ability("cpu"), Ability("hip", (9, 4), triton=True), Ability("mps")], ids=str
    )
    def test_everything_else_loops(self, ability: Ability) -> None:
        assert pick(1, torch.bfloat16, ability, aligned=True) == "loop"

    def test_a_dtype_that_nobody_wrote_kernels_for_loops(self) -> None:
        assert pick(1, torch.float64, HOPPER, aligned=True) == "loop"

    def test_a_cpu_has_no_triton(self) -> None:
        assert slot_experts.ability_of(torch.device("cpu")) == Ability("cpu")


class TestWindows:
    @given(
        st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), unique_by=lambda group: group[0]),
        st.integers(1, 12),
    )
    def test_hold_every_row_once_in_no_more_slots_than_allowed(
        self, held: list[tuple[int, int]], most: int
    ) -> None:
        held.sort()
        stops = list(accumulate(count for _, count in held))
        groups = [(slot, stop - count, stop) for (slot, count), stop in zip(held, stops, strict=True)]
        made = list(windows(groups, most))
        assert [row for window in made for row in range(window.start, window.stop)] == list(
            range(sum(n for _, n in held))
        )
        for window in made:
            assert window.stop_slot - window.first_slot <= most
            inside = [group for group in groups if window.start <= group[1] < group[2] <= window.stop]
            assert (inside[0][0], inside[-1][0] + 1) == (window.first_slot, window.stop_slot)


class Fallback:
    """Experts that believe in a GPU, with what stands in for the kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ability: Ability, kernels: Any) -> None:
        monkeypatch.setattr(slot_experts, "ability_of", lambda device: ability)
        monkeypatch.setitem(sys.modules, "fiddler.gpu.triton_kernels", kernels)
        self.layer = Layer.of(KINDS[0], Sizes(8, 8), torch.bfloat16)
        self.asked = 0
        self.experts = SlotExperts(self.stack, (KINDS[0].formula,))

    def stack(self, layer: int) -> Stack:
        self.asked += 1
        return self.layer.stack

    def run(self) -> None:
        visits = random_visits([1, 2, 0, 0, 1], 2)
        hidden = torch.randn(4, 8, device=DEVICE).bfloat16()
        out = torch.zeros(8, 8, device=DEVICE).bfloat16()
        self.experts.run(0, visits, hidden, out)
        expected = self.layer.reference(visits, hidden, out)
        assert (out.double() - expected).abs().max() <= TOLERANCE[torch.bfloat16] * expected.abs().max()


class Broken:
    """Kernels that cannot be compiled."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.n_calls = 0

    def run(self, *arguments: object) -> None:
        self.n_calls += 1
        raise self.error


class TestFallback:
    @pytest.mark.parametrize("ability", [HOPPER, ADA], ids=["grouped", "loop"])
    def test_without_triton_torch_does_it_and_says_so_once(
        self, ability: Ability, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        fallback = Fallback(monkeypatch, ability, None)  # what `sys.modules` has for a module that is not there
        with caplog.at_level(logging.WARNING, LOGGER):
            for _ in range(3):
                fallback.run()
        (record,) = caplog.records
        assert "without Triton: ModuleNotFoundError" in record.getMessage()
        assert fallback.asked == 3

    def test_kernels_that_fail_are_tried_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken = Broken(RuntimeError("Failed to find C compiler"))
        fallback = Fallback(monkeypatch, HOPPER, broken)
        with caplog.at_level(logging.WARNING, LOGGER):
            for _ in range(3):
                fallback.run()
        assert broken.n_calls == 1
        assert [record.getMessage() for record in caplog.records] == [
            "experts on the GPU run without Triton: RuntimeError: Failed to find C compiler"
        ]

    def test_a_full_memory_is_not_tritons_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = Broken(torch.OutOfMemoryError())
        fallback = Fallback(monkeypatch, HOPPER, broken)
        for n_calls in (1, 2):
            with pytest.raises(torch.OutOfMemoryError):
                fallback.run()
            assert broken.n_calls == n_calls

    def test_a_forced_path_fails_aloud(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fallback = Fallback(monkeypatch, HOPPER, Broken(OSError("no")))
        fallback.experts = SlotExperts(fallback.stack, (KINDS[0].formula,), path="triton")
        with pytest.raises(OSError, match="no"):
            fallback.run()

    def test_a_formula_is_looked_at_once_a_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        swiglu: list[bool] = []
        kernels = SimpleNamespace(run=lambda stack, formula, is_swiglu, *rest: swiglu.append(is_swiglu))
        fallback = Fallback(monkeypatch, HOPPER, kernels)
        tried: list[Tensor] = []

        def activation(x: Tensor) -> Tensor:
            tried.append(x)
            return F.silu(x)

        formulas = ExpertFormula(gated=True, activation=activation), GATED["gelu"]
        experts = SlotExperts(fallback.stack, formulas)
        hidden, out = torch.zeros(4, 8, device=DEVICE).bfloat16(), torch.zeros(8, 8, device=DEVICE).bfloat16()
        for layer in (0, 1, 0, 1):
            experts.run(layer, random_visits([1, 0, 0, 0, 0], 2), hidden, out)
        assert swiglu == [True, False, True, False]
        assert len(tried) == 1


def test_no_rows_ask_for_nothing() -> None:
    def stack(layer: int) -> Stack:
        raise AssertionError("no layer is needed")

    for path in get_args(Method):
        experts = SlotExperts(stack, (KINDS[0].formula,), path=path)
        experts.run(0, random_visits([0, 0], 2), torch.zeros(2, 8), torch.zeros(4, 8))
