"""Which matmul runs is decided by what is stored, and what is stored is measured once."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.calibration import kernels as calibrate
from fiddler.calibration.kernels import MARGIN, MIN_BYTES, calibrated_kernels, calibration_file
from fiddler.config import EngineConfig
from fiddler.devices.kernels import (
    BUCKETS,
    FEW,
    MOST_ZEROS,
    ROOMS,
    TIE,
    TORCH,
    KernelName,
    Kernels,
    Matmul,
    ShapeKey,
    bucket,
    linear,
    rooms,
    rows_last,
    shape_key,
)
from fiddler.devices.native import MOST_ROWS, Native, native
from fiddler.formats.packed import Code, Matrix, Packed
from fiddler.formats.quantise import TARGETS, quantise

LARGE = torch.empty(1024, MIN_BYTES // 2 // 1024, dtype=torch.bfloat16)
OTHER = torch.empty(2048, MIN_BYTES // 2 // 1024, dtype=torch.bfloat16)


class TestBucket:
    @given(st.integers(1, 100_000))
    @settings(deadline=None)
    def test_is_the_nearest_calibrated_count_below(self, n_rows: int) -> None:
        found = bucket(n_rows)
        assert found in BUCKETS
        assert found <= n_rows
        assert not any(found < other <= n_rows for other in BUCKETS)

    @pytest.mark.parametrize("n_rows", BUCKETS)
    def test_of_a_calibrated_count_is_itself(self, n_rows: int) -> None:
        assert bucket(n_rows) == n_rows


class TestKernels:
    def test_nothing_calibrated_is_linear(self) -> None:
        assert {Kernels().name(LARGE, n) for n in (1, 2, 300, 9999)} == {"linear"}

    @given(n_rows=st.integers(1, 2000), chosen=st.sampled_from(BUCKETS))
    @settings(deadline=None)
    def test_choice_holds_for_its_whole_bucket_and_no_other(self, n_rows: int, chosen: int) -> None:
        kernels = Kernels({(shape_key(LARGE), chosen): "rows_last"})
        chosen_here = n_rows < TIE and bucket(n_rows) == chosen
        assert kernels.name(LARGE, n_rows) == ("rows_last" if chosen_here else "linear")

    def test_choice_holds_for_its_shape_and_dtype_only(self) -> None:
        kernels = Kernels({(shape_key(LARGE), 1): "rows_last"})
        assert kernels.name(LARGE, 1) == "rows_last"
        assert kernels.name(OTHER, 1) == "linear"
        assert kernels.name(LARGE.half(), 1) == "linear"

    def test_many_rows_tie(self) -> None:
        kernels = Kernels({(shape_key(LARGE), b): "rows_last" for b in BUCKETS})
        assert kernels.name(LARGE, TIE - 1) == "rows_last"
        assert kernels.name(LARGE, TIE) == "linear"

    @pytest.mark.parametrize("bias", [None, torch.rand(3)])
    @pytest.mark.parametrize("name", TORCH)
    def test_every_kernel_multiplies_one_row(self, name: KernelName, bias: torch.Tensor | None) -> None:
        weight, x = torch.rand(3, 4), torch.rand(1, 4)
        y = TORCH[name](x, weight, bias)
        torch.testing.assert_close(y, x @ weight.T + (0 if bias is None else bias))

    @pytest.mark.parametrize("bias", [None, torch.rand(3)])
    def test_both_kernels_multiply(self, bias: torch.Tensor | None) -> None:
        weight, x = torch.rand(3, 4), torch.rand(5, 4)
        expected = x @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(linear(x, weight, bias), expected)
        torch.testing.assert_close(rows_last(x, weight, bias), expected)


class Measured:
    """Stands for the measurement: notes what was asked for, and makes `rows_last` win up to four rows."""

    def __init__(self) -> None:
        self.asked: list[ShapeKey] = []

    def __call__(self, matrix: Matrix, ours: Native | None) -> dict[int, dict[KernelName, float]]:
        self.asked.append(shape_key(matrix))
        return {n: {"linear": 1.0, "rows_last": 0.5 if n <= 4 else 1.0} for n in BUCKETS}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """A machine with AMX and a measurement that can be counted."""
    fake = Measured()
    monkeypatch.setattr(calibrate, "measure", fake)
    monkeypatch.setattr(calibrate, "amx", lambda: True)
    monkeypatch.setattr(calibrate, "native", lambda: None)
    return fake


def names(kernels: Kernels, matrix: torch.Tensor = LARGE) -> list[KernelName]:
    return [kernels.name(matrix, rows) for rows in BUCKETS]


def entry(**other: object) -> bytes:
    """A stored calibration of one entry, which has all its fields."""
    fields = {"out": 1, "in": 1, "kind": "torch.bfloat16", "side_by_side": True, "rows": 1, "kernel": "linear"}
    return json.dumps({"kernels": [fields | other]}).encode()


EXPECTED = ["rows_last" if rows <= 4 else "linear" for rows in BUCKETS]


class TestCalibration:
    def test_measures_each_shape_once(self, measured: Measured, tmp_path: Path) -> None:
        kernels = calibrated_kernels([LARGE, OTHER, LARGE], EngineConfig(calibration_dir=tmp_path))
        assert sorted(measured.asked, key=str) == sorted(map(shape_key, (LARGE, OTHER)), key=str)
        assert names(kernels) == names(kernels, OTHER) == EXPECTED

    def test_is_stored_and_not_measured_again(self, measured: Measured, tmp_path: Path) -> None:
        config = EngineConfig(calibration_dir=tmp_path / "made" / "when needed")
        first = calibrated_kernels([LARGE], config)
        measured.asked.clear()
        second = calibrated_kernels([LARGE], config)
        assert measured.asked == []
        assert dict(second.choice) == dict(first.choice)
        assert [f.name for f in calibration_file(config).parent.iterdir()] == [calibration_file(config).name]

    def test_stored_choice_wins_over_what_would_be_measured(self, measured: Measured, tmp_path: Path) -> None:
        config = EngineConfig(calibration_dir=tmp_path)
        calibrated_kernels([LARGE], config)
        file = calibration_file(config)
        file.write_text(file.read_text().replace('"linear"', '"rows_last"'))
        assert set(names(calibrated_kernels([LARGE], config))) == {"rows_last"}

    def test_new_shape_is_added_to_the_stored_ones(self, measured: Measured, tmp_path: Path) -> None:
        config = EngineConfig(calibration_dir=tmp_path)
        calibrated_kernels([LARGE], config)
        measured.asked.clear()
        calibrated_kernels([OTHER], config)
        assert measured.asked == [shape_key(OTHER)]
        measured.asked.clear()
        assert names(calibrated_kernels([LARGE, OTHER], config)) == EXPECTED
        assert measured.asked == []

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\xff\xfe",
            b"[]",
            b'{"kernels": 3}',
            b'{"kernels": [{"out": 1024}]}',
            entry(kind="torch.nothing"),
            entry(rows=[1]),
        ],
        ids=["empty", "not text", "no object", "no list", "field missing", "no dtype", "rows not a number"],
    )
    def test_corrupt_file_is_measured_anew_and_replaced(
        self, measured: Measured, tmp_path: Path, content: bytes
    ) -> None:
        config = EngineConfig(calibration_dir=tmp_path)
        calibration_file(config).write_bytes(content)
        assert names(calibrated_kernels([LARGE], config)) == EXPECTED
        assert len(json.loads(calibration_file(config).read_text())["kernels"]) == len(BUCKETS)

    @pytest.mark.parametrize("kernel", ["of_the_future", "vector", "native"])
    def test_a_kernel_that_is_not_for_these_rows_is_measured_anew(
        self, measured: Measured, tmp_path: Path, kernel: str
    ) -> None:
        """`vector` would multiply the first row only, and `native` was not made."""
        config = EngineConfig(calibration_dir=tmp_path)
        calibrated_kernels([LARGE], config)
        file = calibration_file(config)
        file.write_text(file.read_text().replace("rows_last", kernel))
        measured.asked.clear()
        assert names(calibrated_kernels([LARGE], config)) == EXPECTED
        assert measured.asked

    def test_folder_that_cannot_be_made_costs_only_the_measurement(
        self, measured: Measured, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        config = EngineConfig(calibration_dir=tmp_path / "file" / "below")
        assert names(calibrated_kernels([LARGE], config)) == EXPECTED

    def test_folder_that_cannot_be_written_costs_only_the_measurement(
        self, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **options: object) -> None:
            raise PermissionError("read-only")

        monkeypatch.setattr(Path, "write_text", refuse)
        config = EngineConfig(calibration_dir=tmp_path)
        assert names(calibrated_kernels([LARGE], config)) == EXPECTED
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_other_dtypes_are_never_measured(self, measured: Measured, tmp_path: Path, dtype: torch.dtype) -> None:
        kernels = calibrated_kernels([LARGE.to(dtype)], EngineConfig(calibration_dir=tmp_path))
        assert (measured.asked, kernels.choice) == ([], {})

    def test_small_matrices_are_never_measured(self, measured: Measured, tmp_path: Path) -> None:
        kernels = calibrated_kernels([LARGE[:-1]], EngineConfig(calibration_dir=tmp_path))
        assert (measured.asked, kernels.choice) == ([], {})
        assert list(tmp_path.iterdir()) == []

    def test_without_amx_rows_last_is_not_tried(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = EngineConfig(calibration_dir=tmp_path)
        tried, files = [], set()
        for there in (True, False):
            monkeypatch.setattr(calibrate, "amx", lambda there=there: there)
            tried.append([calibrate.candidates(shape_key(LARGE), n, None) for n in (1, 2)])
            files.add(calibration_file(config))
        assert tried == [
            [("linear", "rows_last", "vector"), ("linear", "rows_last")],
            [("linear", "vector"), ("linear",)],
        ]
        assert len(files) == 2

    def test_option_linear_ignores_the_calibration(self, measured: Measured, tmp_path: Path) -> None:
        calibrated_kernels([LARGE], EngineConfig(calibration_dir=tmp_path))
        measured.asked.clear()
        kernels = calibrated_kernels([LARGE], EngineConfig(calibration_dir=tmp_path, kernels="linear"))
        assert set(names(kernels)) == {"linear"}
        assert measured.asked == []

    @pytest.mark.parametrize(
        ("share", "expected"), [(0.5, "rows_last"), (MARGIN, "linear"), (1.0, "linear"), (2.0, "linear")]
    )
    def test_a_near_tie_is_no_reason_to_switch(self, share: float, expected: str) -> None:
        assert calibrate.fastest({"linear": 1.0, "rows_last": share}) == expected

    def test_measuring_times_every_candidate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calibrate, "SET_BYTES", 4096)
        monkeypatch.setattr(calibrate, "amx", lambda: True)
        monkeypatch.setattr(calibrate, "MIN_BYTES", 1024)
        ours = native()
        matrix = torch.empty(16, 32, dtype=torch.bfloat16)
        times = calibrate.measure(matrix, ours)
        tried = {n: set(calibrate.candidates(shape_key(matrix), n, ours)) for n in BUCKETS}
        assert {n: set(by) for n, by in times.items()} == tried
        assert tried[1] >= {"linear", "rows_last", "vector"}
        columns_first = calibrate.measure(torch.empty(32, 16, dtype=torch.bfloat16).T, ours)
        assert not any("native" in by for by in columns_first.values())
        assert all(seconds > 0 for by in times.values() for seconds in by.values())


OURS = native()


def packed(to: str = "int4", rows: int = 64) -> Packed:
    return quantise(torch.linspace(-1, 1, rows * 128).view(rows, 128), TARGETS[to])


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> list[ShapeKey]:
    """What a measurement is asked for, in which codes are faster in registers up to four rows."""
    asked: list[ShapeKey] = []

    def measure(matrix: Matrix, ours: Native | None) -> dict[int, dict[KernelName, float]]:
        asked.append(shape_key(matrix))
        return {n: {"linear": 1.0, "native": 0.5 if n <= 4 else 1.0} for n in BUCKETS}

    monkeypatch.setattr(calibrate, "measure", measure)
    return asked


@pytest.mark.skipif(OURS is None, reason="this machine has no gcc")
class TestPacked:
    """Codes are decoded in registers for every few rows, or whole before torch multiplies, as was measured."""

    def test_what_was_not_measured_is_ours_as_far_as_ours_goes(self) -> None:
        kernels = Kernels(native=OURS)
        found = [kernels.name(packed(), n) for n in (1, MOST_ROWS, MOST_ROWS + 1, 9999)]
        assert found == ["native", "native", "linear", "linear"]
        assert Kernels().name(packed(), 1) == "linear"

    def test_each_kind_is_measured_once_and_its_choice_kept(
        self, both_ways: list[ShapeKey], tmp_path: Path
    ) -> None:
        config = EngineConfig(calibration_dir=tmp_path)
        matrices = [packed(), packed("fp8"), packed(), packed(rows=32)]
        kernels = calibrated_kernels(matrices, config)
        assert sorted(both_ways) == sorted({shape_key(matrix) for matrix in matrices})
        assert len(both_ways) == 3
        expected = ["native" if n <= 4 else "linear" for n in BUCKETS]
        assert [[kernels.name(matrix, n) for n in BUCKETS] for matrix in matrices] == [expected] * 4
        both_ways.clear()
        again = calibrated_kernels(matrices, config)
        assert both_ways == []
        assert dict(again.choice) == dict(kernels.choice)
        assert all(again.is_ours(packed(), n) == (n <= 4) for n in BUCKETS)

    def test_a_stored_choice_that_is_none_is_measured_anew(self, both_ways: list[ShapeKey], tmp_path: Path) -> None:
        config = EngineConfig(calibration_dir=tmp_path)
        calibrated_kernels([packed()], config)
        file = calibration_file(config)
        file.write_text(file.read_text().replace('"native"', '"vector"'))
        assert calibrated_kernels([packed()], config).name(packed(), 1) == "native"
        assert len(both_ways) == 2

    @pytest.mark.parametrize("chosen", ["native", "linear"])
    def test_either_way_multiplies(self, chosen: KernelName) -> None:
        matrix, x = packed(), torch.linspace(-1, 1, 3 * 128).view(3, 128).bfloat16()
        kernels = Kernels({(shape_key(matrix), 2): chosen}, OURS)
        assert kernels.is_ours(matrix, 3) is (chosen == "native")
        expected = x.double() @ matrix.dense(torch.float64).T
        made = kernels.pick(matrix, 3)(x, matrix, None).double()
        torch.testing.assert_close(made, expected, rtol=2e-2, atol=2e-1)

    @pytest.mark.parametrize("scale", [torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.float32])
    def test_measuring_times_both_ways_where_there_are_two(
        self, monkeypatch: pytest.MonkeyPatch, scale: torch.dtype
    ) -> None:
        monkeypatch.setattr(calibrate, "SET_BYTES", 1 << 14)
        monkeypatch.setattr(calibrate, "MIN_BYTES", 1024)
        wide = torch.zeros(32, 128, dtype=torch.uint8)  # rows with gaps between them
        matrix = Packed(Code.FP4, wide[:, :64], torch.ones(32, 4).to(scale), (32, 128), (1, 32))
        times = calibrate.measure(matrix, OURS)
        for n_rows in BUCKETS:
            if n_rows <= MOST_ROWS:
                assert times[n_rows].keys() == {"linear", "native"}
                assert min(times[n_rows].values()) > 0
            else:
                assert times[n_rows] == {"linear": 0.0}

    def test_without_our_kernels_there_is_nothing_to_choose(
        self, both_ways: list[ShapeKey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calibrate, "native", lambda: None)
        assert calibrated_kernels([packed()], EngineConfig(calibration_dir=tmp_path)).choice == {}
        assert both_ways == []


class TestCalibrationFile:
    def test_is_another_for_other_thread_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = EngineConfig(calibration_dir=tmp_path)
        files = set()
        for n_threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
            files.add(calibration_file(config))
        assert len(files) == 2

    def test_lies_in_the_users_cache_by_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert calibration_file(EngineConfig()).parent == tmp_path / "xdg" / "fiddler"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert calibration_file(EngineConfig()).parent == tmp_path / "home" / ".cache" / "fiddler"


class TestRooms:
    @given(st.integers(1, 5000))
    def test_rows_fit_with_few_zeros_and_few_cuts(self, n_rows: int) -> None:
        sizes = rooms(n_rows)
        assert set(sizes) <= set(ROOMS)
        assert sum(sizes[:-1]) < n_rows <= sum(sizes)
        assert n_rows <= FEW or sum(sizes) <= n_rows * (1 + MOST_ZEROS)
        assert len(sizes) <= n_rows // ROOMS[-1] + 4

    @pytest.mark.parametrize("n_rows", [1, 5, 33, 130, 500, 1500])
    @pytest.mark.parametrize("matmul", [linear, rows_last])
    def test_the_product_is_the_same(self, matmul: Matmul, n_rows: int) -> None:
        x, weight, bias = torch.randn(n_rows, 64), torch.randn(48, 64), torch.randn(48)
        expected = torch.nn.functional.linear(*(t.bfloat16().double() for t in (x, weight, bias)))
        made = matmul(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
        assert made.shape == expected.shape
        torch.testing.assert_close(made.double(), expected, rtol=2e-2, atol=2e-1)
