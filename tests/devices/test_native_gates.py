"""Whole experts in our kernels: packed ones, with biases, and every formula that is recognised."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from fiddler.devices.formula import ExpertFormula, run_expert
from fiddler.devices.gates import Activation, Gate, recognised
from fiddler.devices.native import Native, native
from fiddler.devices.outline import Outline
from fiddler.formats.packed import Code, Matrix, Packed
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights
from tests.devices.conftest import Build

needs_compiler = pytest.mark.skipif(native() is None, reason="this machine has no gcc")


def clamped(interleaved: bool) -> Callable[[Tensor], Tensor]:
    """Return gpt-oss's formula."""

    def gate(joined: Tensor) -> Tensor:
        gate, up = (joined[..., ::2], joined[..., 1::2]) if interleaved else joined.chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    return gate


def limited(joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


def limited_after(joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return F.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)


def rounded_once(joined: Tensor) -> Tensor:
    gate, up = joined.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(joined.dtype)


FORMULAS: dict[str, tuple[ExpertFormula, Gate]] = {
    "silu": (ExpertFormula(True, ACT2FN["silu"]), Gate()),
    "gelu": (ExpertFormula(True, ACT2FN["gelu"]), Gate(Activation.GELU)),
    "gelu_tanh": (ExpertFormula(True, ACT2FN["gelu_pytorch_tanh"]), Gate(Activation.GELU_TANH)),
    "relu": (ExpertFormula(True, nn.ReLU()), Gate(Activation.RELU)),
    "quick_gelu": (ExpertFormula(True, ACT2FN["quick_gelu"]), Gate(Activation.SIGMOID, slope=1.702)),
    "relu2": (ExpertFormula(False, ACT2FN["relu2"]), Gate(Activation.RELU2, gated=False)),
    "plain gelu": (ExpertFormula(False, F.gelu), Gate(Activation.GELU, gated=False)),
    "plain silu": (ExpertFormula(False, F.silu), Gate(Activation.SILU, gated=False)),
    "clamped": (
        ExpertFormula(True, None, clamped(True)),
        Gate(Activation.SIGMOID, interleaved=True, limit=7.0, slope=1.702, shift=1.0),
    ),
    "clamped apart": (
        ExpertFormula(True, None, clamped(False)),
        Gate(Activation.SIGMOID, limit=7.0, slope=1.702, shift=1.0),
    ),
    "limited": (ExpertFormula(True, None, limited), Gate(limit=10.0)),
    "limited after": (ExpertFormula(True, None, limited_after), Gate(limit=7.0, limit_after=True)),
}


class TestRecognised:
    @pytest.mark.parametrize("name", FORMULAS)
    def test_is_found_by_its_results(self, name: str) -> None:
        formula, gate = FORMULAS[name]
        found = recognised(formula)
        assert found is not None
        assert (found.activation, found.gated, found.interleaved) == (gate.activation, gate.gated, gate.interleaved)
        assert (found.limit, found.limit_after, found.shift) == (gate.limit, gate.limit_after, gate.shift)
        assert found.activation is not Activation.SIGMOID or found.slope == gate.slope

    @pytest.mark.parametrize(
        "formula",
        [
            ExpertFormula(True, F.silu, post_norm=nn.Identity()),
            ExpertFormula(True, torch.tanh),
            ExpertFormula(False, F.hardswish),
            ExpertFormula(True, None, lambda y: y.chunk(2, -1)[0]),
            ExpertFormula(True, None, lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1].square()),
            ExpertFormula(
                True, None, lambda y: (F.silu(y.float().chunk(2, -1)[0]) * y.float().chunk(2, -1)[1]).to(y)
            ),
            ExpertFormula(True, None, lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1].clamp(max=3.0)),
        ],
    )
    def test_no_other_is(self, formula: ExpertFormula) -> None:
        assert recognised(formula) is None


@pytest.fixture(scope="module", params=["best", "portable"])
def ours(request: pytest.FixtureRequest, build: Build) -> Native:
    return build("-DPORTABLE") if request.param == "portable" else build()


KINDS = {
    "bf16": None,
    "mxfp4": (Code.FP4, torch.float8_e8m0fnu, (1, 32), False),
    "int4": (Code.INT4, torch.float16, (1, 16), True),
    "fp8": (Code.FP8, torch.bfloat16, (16, 16), False),
    "int8": (Code.INT8, torch.float32, (1, 1 << 20), False),
}


PAIRS = [("bf16", "bf16"), ("mxfp4", "mxfp4"), ("int4", "fp8"), ("int8", "bf16")]


def matrix(kind: str, out: int, columns: int, seed: int) -> Matrix:
    """Return a matrix whose products are near one."""
    generator, described = torch.Generator().manual_seed(seed), KINDS[kind]
    if described is None:
        return (torch.randn(out, columns, generator=generator) * columns**-0.5).bfloat16()
    code, scale, block, zeros = described
    codes = torch.randint(0, 112, (out, -(-columns * code.bits // 8)), generator=generator, dtype=torch.uint8)
    grid = -(-out // block[0]), -(-columns // block[1])
    scales = torch.full(grid, 2.0).to(scale)
    kept = torch.randint(0, 16, grid, generator=generator, dtype=torch.uint8) if zeros else None
    spread = {Code.FP4: 6.0, Code.INT4: 8.0, Code.FP8: 50.0, Code.INT8: 60.0}[code]
    return Packed(code, codes, scales, (out, columns), block, kept, factor=0.5 / spread * columns**-0.5)


def expert(
    kinds: tuple[str, str], hidden: int, inner: int, gate: Gate, seed: int, *, biased: bool
) -> ExpertWeights:
    wide, generator = inner * (1 + gate.gated), torch.Generator().manual_seed(seed + 2)
    up, down = matrix(kinds[0], wide, hidden, seed), matrix(kinds[1], hidden, inner, seed + 1)
    if not biased:
        return ExpertWeights((up,), down)
    biases = [torch.randn(n, generator=generator).bfloat16() for n in (wide, hidden)]
    return ExpertWeights((up,), down, (biases[0],), biases[1])


def run(ours: Native, gate: Gate, experts: list[ExpertWeights], x: list[Tensor]) -> list[Tensor]:
    """Return every expert's rows, all run at once."""
    ends = torch.tensor([0, *(len(rows) for rows in x)]).cumsum(0).tolist()
    rows = torch.cat(x)
    out = torch.full_like(rows, torch.nan)
    loads = [Load(i, *ends[i : i + 2]) for i in range(len(x))]
    ours.experts(loads, [Outline.of(own, gate) for own in experts], rows, out)
    return list(out.split([len(rows) for rows in x]))


def product(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """Return the product in float32, rounded once, as our kernels do."""
    dense = weight.dense(torch.float32) if isinstance(weight, Packed) else weight.float()
    return F.linear(x.float(), dense, None if bias is None else bias.float()).bfloat16()


def rows_of(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_near(found: Tensor, expected: Tensor) -> None:
    """A few sums may round the other way between up and down, by a unit of bfloat16."""
    assert found.isfinite().all()
    scale = expected.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-6)
    assert ((found.float() - expected.float()).abs() / scale).max().item() <= 2.0**-6


@needs_compiler
class TestExperts:
    @pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
    @pytest.mark.parametrize(
        "kinds", [("bf16", "bf16"), ("mxfp4", "mxfp4"), ("int4", "fp8"), ("int8", "bf16")], ids="-".join
    )
    @pytest.mark.parametrize("name", FORMULAS)
    def test_are_torch_s(self, ours: Native, name: str, kinds: tuple[str, str], biased: bool) -> None:
        formula, gate = FORMULAS[name]
        for hidden, inner in ((64, 32), (90, 70), (33, 1)):
            experts = [expert(kinds, hidden, inner, gate, 10 * i, biased=biased) for i in range(3)]
            x = [rows_of(n, hidden, seed=n) for n in (1, 6, 19)]
            for found, own, rows in zip(run(ours, gate, experts, x), experts, x, strict=True):
                assert_near(found, run_expert(formula, own, rows, product, product))

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_expert_is_its_own_whatever_runs_beside_it(self, ours: Native, kind: str) -> None:
        gate = FORMULAS["clamped"][1]
        experts = [expert((kind, kind), 130, 66, gate, i, biased=True) for i in range(4)]
        x = [rows_of(n, 130, seed=n) for n in (1, 6, 21, 3)]
        together = run(ours, gate, experts, x)
        for own, rows, beside in zip(experts, x, together, strict=True):
            assert torch.equal(run(ours, gate, [own], [rows])[0], beside)
            assert torch.equal(run(ours, gate, [own], [rows[-1:]])[0], beside[-1:])

    def test_kinds_may_differ_between_experts(self, ours: Native) -> None:
        experts = [expert((kind, kind), 64, 32, Gate(), 5, biased=False) for kind in KINDS]
        x = [rows_of(2, 64, seed=i) for i in range(len(KINDS))]
        for own, rows, beside in zip(experts, x, run(ours, Gate(), experts, x), strict=True):
            assert torch.equal(run(ours, Gate(), [own], [rows])[0], beside)

    @pytest.mark.parametrize("activation", Activation)
    def test_an_activation_is_torch_s_to_a_unit_in_the_last_place(
        self, ours: Native, activation: Activation
    ) -> None:
        """Of every bfloat16 from -60 to 60, through an expert that multiplies by one."""
        every = torch.arange(1 << 16).to(torch.int32).sub(1 << 15).to(torch.int16).view(torch.bfloat16)
        every = every[(every.float().abs() <= 60) & ((every == 0) | (every.float().abs() > 1e-30))][:, None]
        one, gate = torch.ones(1, 1).bfloat16(), Gate(activation, gated=False, slope=1.5)
        found = run(ours, gate, [ExpertWeights((one,), one)], [every])[0]
        expected = gate(every, every).float()
        cancelled = (
            every.float().abs() * 2e-7 * (activation in (Activation.GELU, Activation.GELU_TANH))
        )  # 1 - nearly 1
        assert ((found.float() - expected).abs() <= expected.abs() * 2**-7 + cancelled + 1e-20).all()

    def test_numbers_far_outside_stay_what_they_are(self, ours: Native) -> None:
        one = torch.ones(1, 1).bfloat16()
        far = torch.tensor([[math.inf], [-math.inf], [math.nan], [1e30], [-1e30]]).bfloat16()
        found = run(ours, Gate(gated=False), [ExpertWeights((one,), one)], [far])[0][:, 0].tolist()
        assert found[0] == math.inf
        assert math.isnan(found[2])
        assert found[3] == far[3].item()
        assert abs(found[4]) < 1e-6

    @pytest.mark.parametrize(
        "broken",
        [
            lambda e: ExpertWeights((e.up[0], e.up[0]), e.down),
            lambda e: ExpertWeights(e.up, e.down, (torch.zeros(64),), e.down_bias),
            lambda e: ExpertWeights(e.up, e.down, (torch.zeros(63).bfloat16(),), None),
            lambda e: ExpertWeights(e.up, matrix("fp8", 64, 31, 0)),
            lambda e: ExpertWeights((matrix("fp8", 32, 64, 0), matrix("int8", 32, 64, 0)), e.down),
        ],
    )
    def test_an_expert_that_the_kernels_do_not_take(self, broken: Callable[[ExpertWeights], ExpertWeights]) -> None:
        with pytest.raises(ValueError, match=r"up is|bias|kind"):
            Outline.of(broken(expert(("fp8", "fp8"), 64, 32, Gate(), 0, biased=False)))
