"""Our own kernels: the numbers are torch's to rounding, and a row's are its own whatever runs beside it."""

import gc
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fiddler.calibration import kernels as calibrate
from fiddler.calibration.kernels import calibrated_kernels, calibration_file
from fiddler.config import EngineConfig
from fiddler.devices import library as compiler
from fiddler.devices import native as kernels_of_ours
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.formula import ExpertFormula
from fiddler.devices.kernels import BUCKETS, Kernels, shape_key
from fiddler.devices.library import compiled, keep, kept, loaded, private_room
from fiddler.devices.native import FLAGS, MOST_ROWS, SOURCE, Native, _native, native
from fiddler.devices.outline import Outline
from fiddler.lanes.experts import Ask, ExpertWork, HostRows
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.messages import RunExperts
from fiddler.scheduler.routing import LayerWork, Load
from fiddler.types import ExpertWeights
from tests.devices.conftest import Build
from tests.support.entries import entries
from tests.support.processes import wait_until_gone

needs_compiler = pytest.mark.skipif(native() is None, reason="this machine has no gcc")
SWIGLU = ExpertFormula(gated=True, activation=F.silu)
ROUNDING = 2.0**-7
"""bfloat16 has 8 bits of precision: the two roundings may differ by a unit in the last place of the largest."""


@pytest.fixture(scope="module", params=["best", "portable"])
def ours(request: pytest.FixtureRequest, build: Build) -> Native:
    """The kernels as this machine gets them, and as one without AVX-512's bf16 instructions does."""
    return build("-DPORTABLE") if request.param == "portable" else build()


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
    loads = [Load(i, *ends[i : i + 2]) for i in range(len(x))]
    ours.experts(loads, [Outline.of(own) for own in experts], rows, out)
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
        found, expected = ours.matmul(x, w, None)[0], F.linear(x, w)[0]
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())

    def test_rounds_to_the_nearest_and_ties_to_even(self, ours: Native) -> None:
        x, w = random(1, 1), random(4096, 1, seed=1)  # one product is exact in float32
        assert torch.equal(ours.matmul(x, w, None)[0], (x.float() * w.float()).bfloat16()[:, 0])

    def test_a_bias_may_have_gaps(self, ours: Native) -> None:
        x, w, b = random(2, 64), random(40, 64, seed=1), random(80, seed=2)
        assert torch.equal(ours.matmul(x, w, b[::2]), ours.matmul(x, w, b[::2].clone()))

    def test_gradients_are_left_to_torch(self, ours: Native) -> None:
        x, w = random(2, 64).requires_grad_(), random(40, 64, seed=1)
        ours.matmul(x, w, None).sum().backward()
        assert x.grad is not None

    def test_a_wrong_shape_is_torch_s_error(self, ours: Native) -> None:
        with pytest.raises(RuntimeError, match="shape"):
            ours.matmul(random(2, 63), random(40, 64, seed=1), None)


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
            middle = torch.cat([F.linear(rows, w) for w in own.up], dim=-1).chunk(2, dim=-1)
            terms = F.linear((F.silu(middle[0]) * middle[1]).abs().float(), own.down.abs().float())
            # sums in another order may round what is between up and down the other way, a few units of each term
            assert ((found.float() - reference(own, rows).float()).abs() <= 4 * ROUNDING * terms + 1e-30).all()

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

    def test_rows_of_gate_and_up_may_lie_apart(self, ours: Native) -> None:
        x = [random(3, 64)]
        dense, wide = expert(64, 32, seed=3), random(64, 96, seed=5)
        interleaved = torch.stack(dense.up[0].chunk(2), dim=1).flatten(0, 1)  # gate0, up0, gate1, …
        gate = wide[:32, :64].copy_(interleaved[::2])
        apart = ExpertWeights((gate, interleaved[1::2]), dense.down)
        assert len({matrix.stride(0) for matrix in apart.up}) == 2
        assert torch.equal(run(ours, [apart], x)[0], run(ours, [dense], x)[0])

    def test_other_rows_are_refused(self, ours: Native) -> None:
        for rows in (random(2, 64).float(), random(2, 63)):
            with pytest.raises(ValueError, match="not bfloat16, 64 wide"):
                run(ours, [expert(64, 32, seed=0)], [rows])

    @pytest.mark.parametrize(
        "broken",
        [
            lambda e: ExpertWeights(e.up, e.down[:, :-1]),
            lambda e: ExpertWeights((e.up[0][:-1],), e.down),
            lambda e: ExpertWeights((e.up[0][:, :-1],), e.down),
            lambda e: ExpertWeights(e.up, e.down.float()),
        ],
    )
    def test_an_expert_of_another_shape_is_refused(
        self, ours: Native, broken: Callable[[ExpertWeights], ExpertWeights]
    ) -> None:
        experts = [expert(64, 32, seed=0), broken(expert(64, 32, seed=1))]
        with pytest.raises(ValueError, match=r"64|bfloat16"):
            run(ours, experts, [random(2, 64), random(1, 64)])


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
            (ExpertFormula(gated=True, activation=F.gelu), True),
            (ExpertFormula(gated=True, activation=F.silu, post_norm=torch.nn.Identity()), False),
            (ExpertFormula(gated=True, activation=None, gate=lambda y: y.chunk(2, -1)[0]), False),
        ],
    )
    def test_only_a_formula_that_the_kernels_know_is_run_whole(self, formula: ExpertFormula, whole: bool) -> None:
        assert self.device(formula)._way(0, 1).together == whole

    def test_weights_are_let_go_with_their_device(self) -> None:
        device = self.device()
        self.outputs(device, Load(0, 0, 1))
        down = weakref.ref(device.weights(0, 0).down)
        assert down() is not None
        del device
        gc.collect()
        assert down() is None

    @pytest.mark.parametrize("n_loads", [1, 3])
    def test_a_job_enters_as_many_functions_however_many_loads_it_has(self, n_loads: int) -> None:
        work = ExpertWork(self.device())
        loads = tuple(Load(expert, expert, expert + 1) for expert in range(n_loads))
        rows, routed = random(n_loads, 64), LayerWork(0, loads, tuple(range(n_loads)))
        asked = Ask(0, rows, torch.arange(n_loads)[:, None], torch.ones(n_loads, 1), None)
        with torch.inference_mode():
            layer = Layer(Wave(), routed, n_loads, 1, tensors=HostRows(asked, rows, torch.empty_like(rows)))
            job = RunExperts(0, "cpu", layer, loads, (), 0.0)
            work(job)  # looks at each expert
            assert len(entries(lambda: work(job))) == 5

    def test_gradients_go_through_torch(self) -> None:
        device = self.device()
        rows = random(2, 64).requires_grad_()
        out = torch.zeros(2, 64, dtype=torch.bfloat16)
        device.run(0, [Load(0, 0, 2)], [device.weights(0, 0)], rows, out)
        out.sum().backward()
        assert rows.grad is not None


class TestChoice:
    def test_is_ours_where_ours_is_faster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if (kernels := native()) is None:
            pytest.skip("this machine has no gcc")
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
        key = shape_key(random(8, 8))
        tried = [calibrate.candidates(key, n, object()) for n in (MOST_ROWS, MOST_ROWS + 1)]  # type: ignore[arg-type]
        assert ["native" in names for names in tried] == [True, False]


EVIL = """
#include <fcntl.h>
__attribute__((constructor)) static void start(void) { creat("PLACE", 0600); }
void fiddler_matmul(void) {}
void fiddler_experts(void) {}
"""
"""A library that leaves a mark where it is loaded."""


def damage(content: bytes, kind: str) -> bytes:
    middle = len(content) // 2
    return {
        "empty": b"",
        "no library": b"no library",
        "short": content[:middle],
        "one byte short": content[:-1],
        "a page of zeros": content[:4096] + bytes(4096) + content[8192:],
        "a flipped bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "another digest": content[:-1] + bytes([content[-1] ^ 1]),
        "something behind": content + b"something behind",
    }[kind]


def compiler_script(folder: Path, *lines: str) -> str:
    script = folder / "cc"
    script.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    script.chmod(0o755)
    return str(script)


@lru_cache
def made_of_ours(compiler: Sequence[str]) -> bytes:
    return compiled(compiler, SOURCE, ("-O0", *FLAGS[1:]))


def compiled_before(compiler: Sequence[str], source: Path, flags: Sequence[str]) -> bytes:
    """Return what a compiler makes of our source, without its help if it made it before, and in little time."""
    assert (source, flags) == (SOURCE, FLAGS)
    return made_of_ours(tuple(compiler))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, no memory of other tests' compilers, and gcc's work done before."""
    monkeypatch.setattr(kernels_of_ours, "compiled", compiled_before)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _native.cache_clear()
    yield tmp_path / "cache" / "fiddler"
    _native.cache_clear()


def again() -> Native:
    """The kernels, as another process would get them."""
    _native.cache_clear()
    found = native()
    assert found is not None
    assert_near(found.matmul(random(1, 8), random(4, 8), None), F.linear(random(1, 8), random(4, 8)))
    return found


def only_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_of_ours, "compiled", lambda *_: pytest.fail("compiled twice"))


@needs_compiler
class TestKeeping:
    @pytest.mark.parametrize("mask", [0o002, 0o022, 0o077, 0], ids=oct)
    def test_compiles_once_and_lets_nobody_else_write(
        self, mask: int, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = os.umask(mask)
        try:
            first = again()
        finally:
            os.umask(before)
        assert cache.stat().st_mode & 0o777 == 0o700
        assert first.library.stat().st_mode & 0o777 == 0o600
        assert list(cache.iterdir()) == [first.library]
        only_reads(monkeypatch)
        assert again().library == first.library

    def test_a_folder_of_ours_that_others_may_write_is_mended(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.mkdir(parents=True)
        cache.chmod(0o775)
        again()
        assert cache.stat().st_mode & 0o777 == 0o700
        only_reads(monkeypatch)
        again()

    def test_a_linked_folder_is_used_and_its_mode_left_alone(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.parent.mkdir()
        (tmp_path / "elsewhere").mkdir(mode=0o755)
        cache.symlink_to(tmp_path / "elsewhere")
        again()
        only_reads(monkeypatch)
        again()
        (tmp_path / "elsewhere").chmod(0o775)
        monkeypatch.setattr(kernels_of_ours, "compiled", compiled_before)
        again()
        assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o775

    @pytest.mark.parametrize(
        "kind",
        [
            "empty",
            "no library",
            "short",
            "one byte short",
            "a page of zeros",
            "a flipped bit",
            "another digest",
            "something behind",
        ],
    )
    def test_a_damaged_library_is_never_loaded(self, kind: str, cache: Path) -> None:
        library = again().library
        sound = library.read_bytes()
        library.write_bytes(damage(sound, kind))
        with pytest.raises(OSError, match="damaged"):
            kept(library)
        assert again().library == library
        assert kept(library) == sound[:-32]

    @pytest.mark.parametrize("mode", [0o666, 0o660, 0o777], ids=oct)
    def test_a_library_that_others_may_write_is_made_anew(self, mode: int, cache: Path) -> None:
        library = again().library
        library.chmod(mode)
        with pytest.raises(PermissionError):
            kept(library)
        assert again().library.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
    def test_what_is_no_file_is_not_read(self, kind: str, cache: Path, tmp_path: Path) -> None:
        library = again().library
        library.rename(tmp_path / "moved")
        if kind == "link":
            library.symlink_to(tmp_path / "moved")
        elif kind == "pipe":
            os.mkfifo(library)
        else:
            library.mkdir()
        with pytest.raises(OSError):  # noqa: PT011  # the system says what it is
            kept(library)
        again()

    def test_what_others_own_is_neither_read_nor_written(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        library = again().library
        before = library.stat()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4242)
        for act in (lambda: kept(library), lambda: keep(library, b"")):
            with pytest.raises(PermissionError, match="others may write"):
                act()
        again()
        assert library.stat() == before
        assert list(cache.iterdir()) == [library]

    @pytest.mark.parametrize("mode", [0o700, 0o777], ids=oct)
    def test_a_library_swapped_after_it_was_written_is_not_loaded(
        self, mode: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, mark = tmp_path / "evil.c", tmp_path / "mark"
        source.write_text(EVIL.replace("PLACE", str(mark)))
        evil = compiled(["cc"], source, ["-shared", "-fPIC"])

        def swap(library: Path, made: bytes) -> None:
            keep(library, made)
            library.unlink()
            library.write_bytes(evil + hashlib.sha256(evil).digest())
            library.chmod(0o666)
            cache.chmod(mode)

        monkeypatch.setattr(kernels_of_ours, "keep", swap)
        for _ in range(2):
            again()
        assert not mark.exists()
        loaded(evil)
        assert mark.exists()

    def test_many_may_start_at_once(self, cache: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: _native.__wrapped__(cache, "cc"), range(8)))
        assert all(found)
        assert [file.suffix for file in cache.iterdir()] == [".so"]

    def test_where_nothing_can_be_written_they_last_as_long_as_the_process(self, cache: Path) -> None:
        cache.parent.write_text("in the way")
        assert not again().library.exists()

    def test_without_memory_files_they_are_loaded_from_a_private_one(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(os, "memfd_create")
        again()

    def test_a_folder_that_others_could_replace_is_no_place_to_compile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for mode, taken in ((0o777, False), (0o1777, True), (0o700, True)):
            tmp_path.chmod(mode)
            (tmp_path / "inside").mkdir(exist_ok=True)
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "inside"))
            with private_room() as room:
                assert room.is_relative_to(tmp_path) == taken


class TestCompilers:
    @pytest.mark.parametrize(
        "lines",
        [None, ["exit 1"], ["echo what"], ["echo Free Software Foundation"], ["read line && exit 0"]],
        ids=["no compiler", "broken", "another", "silent", "waiting for input"],
    )
    def test_without_gcc_there_are_none(
        self, lines: list[str] | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = str(tmp_path / "cc") if lines is None else compiler_script(tmp_path, *lines)
        monkeypatch.setenv("CC", script)
        assert native() is None
        assert not calibrated_kernels([random(8, 8)], EngineConfig()).choice

    @pytest.mark.parametrize(
        "named", ['gcc "', "gcc '", "gcc \\", "/", "/dev/null", "no-such-compiler -O2", "false"]
    )
    def test_one_that_cannot_be_used_is_named(
        self, named: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("CC", named)
        assert native() is None
        (said,) = caplog.messages
        assert said.startswith(f"CC={named} ")

    @pytest.mark.parametrize(
        ("then", "reason"),
        [
            ('while [ "$1" != -o ]; do shift; done; mkfifo "$2"', "it made no library"),
            ("exit 0", "it made no library"),
            ("echo native.c:1: error: no room; echo compilation terminated.; exit 1", "error: no room"),
        ],
        ids=["a pipe", "nothing", "an error"],
    )
    def test_what_became_of_a_compilation_is_told(
        self,
        then: str,
        reason: str,
        cache: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        version = 'if [ "$1" = --version ]; then echo Free Software Foundation; exit 0; fi'
        monkeypatch.setenv("CC", compiler_script(tmp_path, version, then))
        assert native() is None
        (said,) = caplog.messages
        assert reason in said

    @needs_compiler
    @pytest.mark.parametrize("named", ["", "  "])
    def test_nothing_named_is_the_machine_s_own(
        self, named: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", named)
        assert native() is not None

    @pytest.mark.parametrize(
        "doing", ["sleep 1000", "yes", "trap '' TERM INT HUP; while :; do sleep 1; done"], ids=lambda line: line[:5]
    )
    @pytest.mark.parametrize("when", ["asked", "compiling"])
    def test_one_that_hangs_is_ended_with_all_it_started(
        self,
        when: str,
        doing: str,
        cache: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        answer = 'if [ "$1" = --version ]; then echo Free Software Foundation; exit; fi'
        pids = tmp_path / "pids"
        lines = [f"echo $$ >> {pids}", f"sleep 1000 & echo $! >> {pids}", doing]
        monkeypatch.setenv("CC", compiler_script(tmp_path, *([answer] if when == "compiling" else []), *lines))
        monkeypatch.setattr(kernels_of_ours, "VERSION_S", 1.0)
        monkeypatch.setattr(compiler, "COMPILE_S", 1.0)
        monkeypatch.setattr(compiler, "PATIENCE_S", 0.2)
        assert native() is None
        *waiting, given_up = caplog.messages
        assert doing == "yes" or "waiting for the C compiler" in waiting[0]
        assert "cannot compile" in given_up
        for pid in pids.read_text().split():
            wait_until_gone(int(pid))

    def test_one_that_ends_leaves_nothing_running(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started = f"sleep 1000 > {os.devnull} 2>&1 & echo $! > {tmp_path / 'pid'}"
        monkeypatch.setenv("CC", compiler_script(tmp_path, started, "echo another"))
        assert native() is None
        wait_until_gone(int((tmp_path / "pid").read_text()))
