"""Our own kernels: the numbers are torch's to rounding, and a row's are its own whatever runs beside it."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fiddler.config import EngineConfig
from fiddler.devices import calibrate
from fiddler.devices.base import ExpertFormula
from fiddler.devices.calibrate import calibrated_kernels, calibration_file
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.kernels import BUCKETS, Kernels, shape_key
from fiddler.devices.native import MOST_ROWS, Native, compiled, native
from fiddler.scheduler.routing import Load
from fiddler.types import ExpertWeights

COMPILER = shutil.which(os.environ.get("CC") or "cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="this machine has no C compiler")
SWIGLU = ExpertFormula(gated=True, activation=F.silu)
ROUNDING = 2.0**-7
"""bfloat16 has 8 bits of precision: the two roundings may differ by a unit in the last place of the largest."""


@pytest.fixture(scope="module", params=["best", "portable"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    """The kernels as this machine gets them, and as one without AVX-512's bf16 instructions does."""
    assert COMPILER is not None
    options = ["-DPORTABLE"] if request.param == "portable" else []
    return Native(compiled(COMPILER, tmp_path_factory.mktemp("native") / "kernels.so", *options))


@pytest.fixture
def threads() -> Iterator[None]:
    """Another number of threads for a while."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expert(hidden: int, inner: int, seed: int, *, joined: bool = True) -> ExpertWeights:
    up = random(2 * inner, hidden, seed=seed) * hidden**-0.5
    return ExpertWeights((up,) if joined else up.chunk(2), random(hidden, inner, seed=seed + 1) * inner**-0.5)


def reference(weights: ExpertWeights, x: Tensor) -> Tensor:
    """Torch's numbers, rounded where the model rounds."""
    gate, up = torch.cat([F.linear(x, w) for w in weights.up], dim=-1).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights.down)


def run(ours: Native, experts: list[ExpertWeights], x: list[Tensor]) -> list[Tensor]:
    """Return every expert's rows, all run at once."""
    ends = torch.tensor([0, *(len(rows) for rows in x)]).cumsum(0).tolist()
    rows = torch.cat(x)
    out = torch.full_like(rows, torch.nan)
    ours.experts([Load(i, *ends[i : i + 2]) for i in range(len(x))], experts, rows, out)
    return list(out.split([len(rows) for rows in x]))


def assert_near(found: Tensor, expected: Tensor) -> None:
    scale = expected.float().abs().max().clamp(min=1e-6)
    assert ((found.float() - expected.float()).abs().max() / scale).item() <= ROUNDING


@needs_compiler
class TestMatmul:
    @given(out=st.integers(1, 70), columns=st.integers(1, 150), n_rows=st.integers(1, 11), bias=st.booleans())
    @settings(max_examples=60)
    def test_is_torch_s_product(self, ours: Native, out: int, columns: int, n_rows: int, bias: bool) -> None:
        x, w, b = random(n_rows, columns), random(out, columns, seed=1), random(out, seed=2) if bias else None
        exact = F.linear(x.float(), w.float(), None if b is None else b.float())
        assert_near(ours.matmul(x, w, b), exact)

    def test_a_row_is_its_own_whatever_runs_beside_it(self, ours: Native) -> None:
        x, w = random(9, 333), random(65, 333, seed=1)
        together = ours.matmul(x, w, None)
        for i in range(9):
            assert torch.equal(ours.matmul(x[i : i + 1], w, None)[0], together[i])

    @pytest.mark.usefixtures("threads")
    def test_threads_change_no_bit(self, ours: Native) -> None:
        x, w = random(3, 2048), random(500, 2048, seed=1)
        found = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(ours.matmul(x, w, None))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    def test_rows_of_weights_may_lie_apart(self, ours: Native) -> None:
        wide, x = random(40, 96), random(2, 64)
        assert torch.equal(ours.matmul(x, wide[:, :64], None), ours.matmul(x, wide[:, :64].contiguous(), None))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_what_does_not_fit_is_left_to_torch(self, ours: Native, dtype: torch.dtype) -> None:
        x, w = random(2, 64), random(40, 64, seed=1)
        assert torch.equal(ours.matmul(x.to(dtype), w.to(dtype), None), F.linear(x.to(dtype), w.to(dtype)))
        columns_first = w.t().contiguous().t()
        assert torch.equal(ours.matmul(x, columns_first, None), F.linear(x, columns_first))

    def test_what_is_no_number_stays_none(self, ours: Native) -> None:
        x, w = random(1, 64), random(8, 64, seed=1)
        w[3, 5] = torch.nan
        w[4, 5] = torch.inf
        found = ours.matmul(x, w, None)[0].isfinite().tolist()
        assert found == [i not in (3, 4) for i in range(8)]


@needs_compiler
class TestExperts:
    @given(
        hidden=st.integers(1, 90),
        inner=st.integers(1, 70),
        loads=st.lists(st.integers(1, 9), min_size=1, max_size=5),
        joined=st.booleans(),
    )
    @settings(max_examples=40)
    def test_are_torch_s(self, ours: Native, hidden: int, inner: int, loads: list[int], joined: bool) -> None:
        experts = [expert(hidden, inner, seed=10 * i, joined=joined) for i in range(len(loads))]
        x = [random(n, hidden, seed=100 + i) for i, n in enumerate(loads)]
        for found, own, rows in zip(run(ours, experts, x), experts, x, strict=True):
            exact = reference(ExpertWeights(tuple(w.float() for w in own.up), own.down.float()), rows.float())
            scale = exact.abs().max().clamp(min=1e-6)
            # three roundings on the way, each of half a unit, of terms that may cancel
            assert ((found.float() - exact).abs().max() / scale).item() <= 8 * ROUNDING

    def test_an_expert_is_its_own_whatever_runs_beside_it(self, ours: Native) -> None:
        experts = [expert(130, 66, seed=i) for i in range(4)]
        x = [random(n, 130, seed=n) for n in (1, 6, 2, 3)]
        together = run(ours, experts, x)
        for own, rows, beside in zip(experts, x, together, strict=True):
            assert torch.equal(run(ours, [own], [rows])[0], beside)
            assert torch.equal(run(ours, [own], [rows[-1:]])[0], beside[-1:])

    def test_joined_or_apart_is_the_same(self, ours: Native) -> None:
        x = [random(2, 64)]
        joined, apart = (run(ours, [expert(64, 32, seed=3, joined=j)], x)[0] for j in (True, False))
        assert torch.equal(joined, apart)

    def test_other_rows_are_refused(self, ours: Native) -> None:
        with pytest.raises(TypeError, match="bfloat16"):
            run(ours, [expert(64, 32, seed=0)], [random(2, 64).float()])


@needs_compiler
class TestDevice:
    def device(self, formula: ExpertFormula = SWIGLU) -> CpuDevice:
        experts = [expert(64, 32, seed=10 * i) for i in range(3)]
        matrices = (experts[0].up[0], experts[0].down)
        choice = {(shape_key(m), n): "native" for m in matrices for n in BUCKETS if n <= 4}
        return CpuDevice(lambda _, e: experts[e], (formula,), Kernels(choice, native()))  # type: ignore[arg-type]

    def outputs(self, device: CpuDevice, *loads: Load) -> Tensor:
        rows = random(20, 64, seed=7)
        out = torch.zeros_like(rows)
        device.run(0, loads, [device.weights(0, load.expert) for load in loads], rows, out)
        return out

    def test_loads_write_their_own_rows_together_or_alone(self) -> None:
        device = self.device()
        loads = (Load(0, 0, 1), Load(1, 1, 4), Load(2, 4, 20))  # the last has too many rows for the kernels
        together = self.outputs(device, *loads)
        for load in loads:
            alone = self.outputs(device, load)
            assert torch.equal(alone[load.start : load.stop], together[load.start : load.stop])
            assert not alone[: load.start].any()
            assert not alone[load.stop :].any()
            assert_near(alone[load.start : load.stop], self.expected(device, load))

    def expected(self, device: CpuDevice, load: Load) -> Tensor:
        return reference(device.weights(0, load.expert), random(20, 64, seed=7)[load.start : load.stop])

    @pytest.mark.parametrize(
        ("formula", "whole"),
        [
            (SWIGLU, True),
            (ExpertFormula(gated=True, activation=torch.nn.SiLU()), True),
            (ExpertFormula(gated=True, activation=F.gelu), False),
            (ExpertFormula(gated=True, activation=F.silu, post_norm=torch.nn.Identity()), False),
            (ExpertFormula(gated=True, activation=None, gate=lambda y: y.chunk(2, -1)[0]), False),
        ],
    )
    def test_only_plain_swiglu_is_run_whole(self, formula: ExpertFormula, whole: bool) -> None:
        way = self.device(formula)._way(0, 1)
        assert (way.together is not None) == whole


class TestChoice:
    def test_is_ours_where_ours_is_faster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if (kernels := native()) is None:
            pytest.skip("this machine has no C compiler")
        times = {n: {"linear": 1.0, "native": 0.5} if n <= 8 else {"linear": 1.0} for n in BUCKETS}
        monkeypatch.setattr(calibrate, "measure", lambda key, ours: times)
        config, matrix = EngineConfig(calibration_dir=tmp_path), random(8, 8)
        for _ in range(2):  # measured, then read
            found = calibrated_kernels([matrix], config)
            assert [found.name(matrix, n) for n in (1, 8, 16)] == ["native", "native", "linear"]
            assert found.pick(matrix, 1) == kernels.matmul
        monkeypatch.setattr(calibrate, "native", lambda: None)
        assert not calibration_file(config).exists()  # without the kernels it is another one

    def test_is_not_tried_with_many_rows(self) -> None:
        tried = [calibrate.candidates(1 << 30, n, object()) for n in (MOST_ROWS, MOST_ROWS + 1)]  # type: ignore[arg-type]
        assert ["native" in names for names in tried] == [True, False]


class TestCompiling:
    @needs_compiler
    def test_happens_once(self) -> None:
        first = native()
        assert first is not None
        made = first.library.stat().st_mtime_ns
        assert native() is first
        assert first.library.stat().st_mtime_ns == made
        assert [file.suffix for file in first.library.parent.glob("native-*")] == [".so"]

    @pytest.mark.parametrize(
        "script", [None, "#!/bin/sh\nexit 1\n", "#!/bin/sh\necho what\n"], ids=["no compiler", "broken", "silent"]
    )
    def test_without_a_compiler_there_are_none(
        self, script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiler = tmp_path / "cc"
        if script is not None:
            compiler.write_text(script)
            compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(compiler))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert native() is None
        assert not calibrated_kernels([random(8, 8)], EngineConfig()).choice
