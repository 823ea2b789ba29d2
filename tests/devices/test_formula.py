"""One expert's formula: any three flags together against a plain reference, and against transformers' own."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from fiddler.devices.cpu import CpuDevice
from fiddler.devices.formula import ExpertFormula, run_expert
from fiddler.devices.kernels import BUCKETS, Kernels, shape_key
from fiddler.lanes.experts import ComputeLane
from fiddler.models import seam
from fiddler.types import ExpertWeights
from tests.support.covering import covering

H, I = 24, 16  # noqa: E741  # the design's letters
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu2": ACT2FN["relu2"]}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error, as a share of the largest value."""


def own_gate(up: Tensor) -> Tensor:
    """A gate as gpt-oss has it: interleaved and clamped."""
    gate, up = up[..., ::2], up[..., 1::2]
    gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def norm(y: Tensor) -> Tensor:
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3)


@dataclass(frozen=True)
class Flags:
    """What varies between experts; `gate` names an activation or is "own"; `None` where there is no gate."""

    gate: str | None
    activation: str
    split: bool
    bias: bool
    post_norm: bool
    transposed: bool

    def __str__(self) -> str:
        on = [name for name in ("split", "bias", "post_norm", "transposed") if getattr(self, name)]
        return "+".join([self.gate or f"ungated {self.activation}", *on])

    @property
    def n_up(self) -> int:
        return I if self.gate is None else 2 * I


GATES = (("silu", "silu"), ("gelu", "gelu"), ("own", "silu"), (None, "silu"), (None, "relu2"))
"""A gate and an activation."""
BOTH = (False, True)
KERNELS = ("linear", "rows_last")
DTYPES = (torch.float32, torch.bfloat16)


def flags_with(*axes: Iterable[Any], strength: int = 3, split: Iterable[bool] = BOTH) -> list[tuple[Any, ...]]:
    """Return flags beside values of other axes: any three of gate, flags and axes together, or `strength`."""
    cases = covering(
        GATES, split, BOTH, BOTH, BOTH, *axes, strength=strength, where=lambda gate, cut, *_: gate[0] or not cut
    )
    return [(Flags(*gate, *rest[:4]), *rest[4:]) for gate, *rest in cases]


UNSPLIT = (False,)
"""As a module of transformers has its matrices."""


def formula(flags: Flags) -> ExpertFormula:
    return ExpertFormula(
        gated=flags.gate is not None,
        activation=None if flags.gate == "own" else ACTIVATIONS[flags.activation],
        gate=own_gate if flags.gate == "own" else None,
        post_norm=norm if flags.post_norm else None,
    )


def matrix(out: int, columns: int, flags: Flags, dtype: torch.dtype) -> Tensor:
    shape = (columns, out) if flags.transposed else (out, columns)
    values = (torch.randn(shape) / columns**0.5).to(dtype)
    return values.t() if flags.transposed else values


def random_weights(flags: Flags, dtype: torch.dtype) -> ExpertWeights:
    torch.manual_seed(0)
    up = matrix(flags.n_up, H, flags, dtype)
    up_bias = torch.randn(flags.n_up).to(dtype)
    return ExpertWeights(
        up=up.chunk(2) if flags.split else (up,),
        down=matrix(H, I, flags, dtype),
        up_bias=() if not flags.bias else up_bias.chunk(2) if flags.split else (up_bias,),
        down_bias=torch.randn(H).to(dtype) if flags.bias else None,
    )


def reference(flags: Flags, weights: ExpertWeights, x: Tensor) -> Tensor:
    """Return the expert's output in float64, written down as plainly as can be."""
    up = x.double() @ torch.cat(weights.up).double().T
    if flags.bias:
        up += torch.cat(weights.up_bias).double()
    if flags.gate == "own":
        middle = own_gate(up)
    elif flags.gate is not None:
        middle = ACTIVATIONS[flags.gate](up[:, :I]) * up[:, I:]
    else:
        middle = ACTIVATIONS[flags.activation](up)
    y = middle @ weights.down.double().T
    if weights.down_bias is not None:
        y += weights.down_bias.double()
    return norm(y) if flags.post_norm else y


def run(flags: "Flags", weights: ExpertWeights, x: Tensor, kernels: Kernels) -> Tensor:
    up, down = (kernels.pick(w, x.shape[0]) for w in (weights.up[0], weights.down))
    return run_expert(formula(flags), weights, x, up, down)


def rows_last_for(*matrices: Tensor) -> Kernels:
    return Kernels({(shape_key(m), rows): "rows_last" for m in matrices for rows in BUCKETS})


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    error = (actual.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(("flags", "kernel", "dtype", "n_rows"), flags_with(KERNELS, DTYPES, (1, 2, 5)), ids=str)
def test_equals_the_reference(flags: Flags, kernel: str, dtype: torch.dtype, n_rows: int) -> None:
    weights = random_weights(flags, dtype)
    kernels = rows_last_for(*weights.up, weights.down) if kernel == "rows_last" else Kernels()
    x = torch.randn(n_rows, H).to(dtype)
    y = run(flags, weights, x, kernels)
    assert y.shape == (n_rows, H)
    assert_near(y, reference(flags, weights, x), dtype)


@pytest.mark.parametrize(("chosen", "n_rows", "split"), covering(["up", "down"], [1, 2, 5], BOTH))
def test_each_matrix_has_its_own_kernel(chosen: str, n_rows: int, split: bool) -> None:
    flags = Flags("silu", "silu", split, bias=True, post_norm=True, transposed=False)
    weights = random_weights(flags, torch.float32)
    kernels = rows_last_for(*(weights.up if chosen == "up" else (weights.down,)))
    x = torch.randn(n_rows, H)
    y = run(flags, weights, x, kernels)
    assert y.shape == (n_rows, H)
    assert_near(y, reference(flags, weights, x), torch.float32)


def test_the_rows_are_left_as_they_were() -> None:
    flags = Flags("silu", "silu", split=False, bias=True, post_norm=True, transposed=False)
    x = torch.randn(3, H)
    before = x.clone()
    run(flags, random_weights(flags, torch.float32), x, Kernels())
    assert torch.equal(x, before)


class Allocations(TorchDispatchMode):
    """Notes the size of every tensor an operation makes, views of what was there before left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        made = out if isinstance(out, list | tuple) else [out]
        self.sizes += [
            t.nbytes for t in made if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
        ]
        return out


class TestNoCopies:
    @pytest.mark.parametrize(("flags", "kernel"), flags_with(KERNELS), ids=str)
    def test_no_operation_makes_as_much_as_a_weight_matrix(self, flags: Flags, kernel: str) -> None:
        weights = random_weights(flags, torch.bfloat16)
        kernels = rows_last_for(*weights.up, weights.down) if kernel == "rows_last" else Kernels()
        with torch.inference_mode(), Allocations() as made:
            for n_rows in (1, 5):
                run(flags, weights, torch.empty(n_rows, H, dtype=torch.bfloat16), kernels)
        assert len(made.sizes) > 4
        assert max(made.sizes) < min(m.nbytes for m in (*weights.up, weights.down))

    def test_a_copy_would_be_seen(self) -> None:
        weight = torch.randn(H, I).t()
        with torch.inference_mode(), Allocations() as made:
            F.linear(torch.randn(1, H), weight.contiguous())
        assert max(made.sizes) == weight.nbytes


# What `use_experts_implementation` knows depends on the version of transformers.
DECORATOR_FLAGS = inspect.signature(use_experts_implementation).parameters
E, K, T = 4, 2, 7


class Config(SimpleNamespace):
    """All that an experts module asks of its configuration."""

    _experts_implementation: str


def experts_module(flags: Flags) -> nn.Module:
    """Build an experts module as a model of transformers has it, with these flags and random weights."""

    class Experts(nn.Module):
        if flags.gate == "own":

            def _apply_gate(self, up: Tensor) -> Tensor:
                return own_gate(up)

        def __init__(self, config: Config) -> None:
            super().__init__()
            self.num_experts = E
            self.act_fn = ACTIVATIONS[flags.activation]
            up = "up_proj" if flags.gate is None else "gate_up_proj"
            for name, out, columns in ((up, flags.n_up, H), ("down_proj", H, I)):
                shape = (E, columns, out) if flags.transposed else (E, out, columns)
                setattr(self, name, nn.Parameter(torch.randn(shape) / columns**0.5))
                if flags.bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, out)))
            if flags.post_norm:
                self.post_expert_norm = norm

        def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            raise AssertionError("the registry decides")

    options = {
        "is_concatenated": flags.gate != "own",
        "is_transposed": flags.transposed,
        "has_bias": flags.bias,
        "has_gate": flags.gate is not None,
        "has_post_expert_norm": flags.post_norm,
    }
    known = {name: value for name, value in options.items() if name in DECORATOR_FLAGS}
    torch.manual_seed(1)
    return use_experts_implementation(**known)(Experts)(Config(_experts_implementation="batched_mm"))


def lane(module: Any, kernels: Kernels) -> ComputeLane:
    device = CpuDevice(lambda _, expert: seam.module_weights(module, expert), (seam.formula(module),), kernels)
    return ComputeLane(device, (E,))


@pytest.mark.parametrize(("flags", "kernel"), flags_with(KERNELS, split=UNSPLIT), ids=str)
def test_equals_transformers_own_experts(flags: Flags, kernel: str) -> None:
    if flags.post_norm and "has_post_expert_norm" not in DECORATOR_FLAGS:
        pytest.skip("this transformers knows no norm after an expert")
    module: Any = experts_module(flags)
    hidden = torch.randn(T, H)
    index = torch.rand(T, E).topk(K).indices
    routing = torch.rand(T, K)
    with torch.inference_mode():
        expected = module(hidden, index, routing)
        weights = seam.module_weights(module, 0)
        kernels = rows_last_for(*weights.up, weights.down) if kernel == "rows_last" else Kernels()
        assert seam.is_seamed(module)
        seam.bind({"experts": module}, lane(module, kernels).run)
        module.config._experts_implementation = seam.NAME
        actual = module(hidden, index, routing)
    assert_near(actual, expected, torch.float32)


@pytest.mark.parametrize("flags", [flags for (flags,) in flags_with(strength=2, split=UNSPLIT)], ids=str)
def test_module_weights_are_views_of_the_modules_parameters(flags: Flags) -> None:
    module = experts_module(flags)
    weights = seam.module_weights(module, 2)
    assert weights.up[0].shape == (flags.n_up, H)
    assert weights.down.shape == (H, I)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for part in (*weights.up, weights.down, *weights.up_bias):
        assert part.untyped_storage().data_ptr() in own
    assert (weights.down_bias is not None) == flags.bias
