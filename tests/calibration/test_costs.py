"""What a model's experts take on this machine: measured in seconds, stored, read back, and shown."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fiddler.calibration import kernels, measure
from fiddler.calibration.costs import Calibration, calibrate
from fiddler.calibration.measure import FITTED, HELD_OUT, Bench, rising, typical
from fiddler.calibration.sample import bench_of, open_experts
from fiddler.cli import app
from fiddler.config import EngineConfig
from fiddler.devices.kernels import BUCKETS, KernelName, ShapeKey, shape_key
from fiddler.devices.native import native
from fiddler.engine import sim_assembly
from fiddler.errors import ConfigError
from fiddler.formats.packed import Matrix, Packed
from fiddler.models.loaded import load
from tests.support.covering import spread
from tests.support.tiny import N_LAYERS, save_tiny

EXPERT_BYTES = 3 * 64 * 32 * 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure less: what comes out is not looked at."""
    monkeypatch.setattr(measure, "CURVE_S", 0.0)
    monkeypatch.setattr(measure, "LEAST", 2)
    monkeypatch.setattr(measure, "BESIDE_S", 0.01)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(device="sim", calibration_dir=tmp_path / "calibrations")


def calibrated(model: Path, config: EngineConfig, *, anew: bool = False) -> Calibration:
    experts = open_experts(model, config)
    return calibrate(bench_of(experts, config), experts, config, anew=anew)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, args)], env={"COLUMNS": "200"})


def run_json(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def test_measuring_a_tiny_model_takes_a_second_or_so(tiny: Path, config: EngineConfig) -> None:
    experts = open_experts(tiny, config)
    bench = bench_of(experts, config)
    began = perf_counter()
    found = calibrate(bench, experts, config)

    assert found.fresh
    assert perf_counter() - began < 10.0  # 1.1 s on a machine that has nothing else to do


def test_curves_rise_and_everything_takes_time(tiny: Path, config: EngineConfig) -> None:
    found = calibrated(tiny, config)
    expert = found.costs.experts[0]

    assert len(found.costs.experts) == N_LAYERS
    assert len(set(found.costs.experts)) == 1
    assert expert.nbytes == EXPERT_BYTES
    for curve in (expert.cpu, expert.gpu):
        assert [n for n, _ in curve.points] == list(FITTED)
        seconds = [s for _, s in curve.points]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0.0
        assert curve(2048) >= curve(512)
    assert expert.copy_s > 0.0
    assert found.costs.contention.cpu >= 1.0
    assert found.costs.contention.link >= 1.0


@pytest.mark.usefixtures("quick")
def test_residuals_are_of_row_counts_that_no_curve_was_fitted_to(tiny: Path, config: EngineConfig) -> None:
    found = calibrated(tiny, config)

    assert {(h.lane, h.n_rows) for h in found.held_out} == {(lane, n) for lane in ("cpu", "gpu") for n in HELD_OUT}
    assert not set(HELD_OUT) & set(FITTED)
    for held in found.held_out:
        curve = getattr(found.costs.experts[0], held.lane)
        assert held.predicted_s == curve(held.n_rows)
        assert held.error == pytest.approx(abs(curve(held.n_rows) / held.measured_s - 1.0))


@pytest.mark.usefixtures("quick")
def test_what_is_stored_is_read_back_equal(tiny: Path, config: EngineConfig) -> None:
    measured, read = calibrated(tiny, config), calibrated(tiny, config)

    assert (measured.fresh, read.fresh) == (True, False)
    assert read == replace(measured, fresh=False)
    assert [file.name for file in measured.file.parent.glob("costs-*")] == [measured.file.name]  # no part of one


@pytest.mark.usefixtures("quick")
def test_it_is_measured_again_on_request(tiny: Path, config: EngineConfig) -> None:
    calibrated(tiny, config)

    assert calibrated(tiny, config, anew=True).fresh


COSTS, HELD = ("copy_s", "link", "row_s", "host_s"), "measured_s"
"""Figures of a cost model, and one that is held against it: the two are read apart."""
NO_FIGURES = ("NaN", "Infinity", '"x"', f"1{'0' * 400}")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '"costs"',
        lambda text: "\x00\x01",
        lambda text: text.replace('"layers": [', '"layers": [7,'),
        lambda text: text.replace('"layers": [', '"layers": [0,'),
        lambda text: text.replace('"held_out"', '"held"'),
        lambda text: text.replace('"lane"', '"line"'),
        lambda text: text.replace('"contention"', '"contempt"'),
        *(
            lambda text, field=field, value=value: re.sub(rf'("{field}": )[^,}}]+', rf"\g<1>{value}", text)
            for field, value in (*product([*COSTS, HELD], ["-1"]), *spread([COSTS, [HELD]], NO_FIGURES))
        ),
    ],
)
def test_a_damaged_file_is_measured_again(tiny: Path, config: EngineConfig, damage: Any) -> None:
    file = calibrated(tiny, config).file
    compact = json.dumps(json.loads(file.read_text()))
    file.write_text(damage(compact))
    assert file.read_text() != compact

    assert calibrated(tiny, config).fresh
    assert not calibrated(tiny, config).fresh


@pytest.mark.usefixtures("quick")
def test_a_folder_that_cannot_be_written_costs_a_measurement_only(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    config = EngineConfig(device="sim", calibration_dir=tmp_path / "file")

    found = calibrated(tiny, config)

    assert found.fresh
    assert not found.file.is_file()
    assert calibrated(tiny, config).fresh


@pytest.mark.usefixtures("quick")
def test_other_experts_and_other_devices_are_measured_apart(
    tiny: Path, tmp_path: Path, config: EngineConfig
) -> None:
    other = save_tiny(tmp_path / "other", moe_intermediate_size=48)
    files = {
        calibrated(tiny, config).file,
        calibrated(other, config).file,
        calibrated(tiny, replace(config, device="cpu")).file,
        calibrated(tiny, replace(config, dtype="bfloat16")).file,
    }

    assert len(files) == 4


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_the_engine_finds_what_was_measured_for_it(
    kind: str, device: Any, tmp_path: Path, config: EngineConfig
) -> None:
    """Opened for its experts alone, a model has the same shapes as when it is loaded whole."""
    model, config = save_tiny(tmp_path / kind, kind), replace(config, device=device)
    measured = calibrated(model, config)
    loaded = load(model, config)
    whole = bench_of(loaded, config)
    if device == "sim":
        accelerator = sim_assembly._accelerator(loaded, config)
        whole = Bench(whole.host, loaded.n_experts, accelerator)

    found = calibrate(whole, loaded, config)

    assert not found.fresh
    assert found.costs == measured.costs


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("kept", "device"), [("int4", "cpu"), ("int8", "sim")])
def test_packed_experts_have_costs_of_their_own(
    kept: Any, device: Any, tiny: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to multiply codes are measured, then whole experts, by the way chosen for their rows."""
    asked: list[ShapeKey] = []

    def measured(matrix: Matrix, ours: object) -> dict[int, dict[KernelName, float]]:
        asked.append(shape_key(matrix))
        return {n: {"linear": 1.0, "native": 0.5 if n < 4 else 1.0} for n in BUCKETS}

    monkeypatch.setattr(kernels, "measure", measured)
    plain, packed = (
        replace(config, device=device, dtype="bfloat16", expert_dtype=kept) for kept in ("checkpoint", kept)
    )
    before, found = calibrated(tiny, plain), calibrated(tiny, packed)

    assert before.file != found.file
    assert found.fresh
    assert found.costs.experts[0].nbytes < before.costs.experts[0].nbytes
    experts = open_experts(tiny, packed)
    bench = bench_of(experts, packed)
    expert = bench.host.weights(0, 1)
    assert all(isinstance(matrix, Packed) for matrix in expert.matrices)
    if (ours := native()) is not None:
        assert {shape_key(matrix) for matrix in expert.matrices} < set(asked)
        assert bench.host._way(0, 3).together
        assert not bench.host._way(0, 4).together
        assert bench.host._way(0, 3).up == ours.matmul
    loaded = load(tiny, packed)
    again = calibrate(bench_of(loaded, packed), loaded, packed)
    assert not again.fresh
    assert again.costs == found.costs


def test_groups_that_do_not_divide_an_expert_are_refused(tmp_path: Path, config: EngineConfig) -> None:
    odd = save_tiny(tmp_path / "odd", moe_intermediate_size=40)
    with pytest.raises(ConfigError, match="expert_dtype='int4' needs rows of a multiple of 32 numbers"):
        open_experts(odd, replace(config, expert_dtype="int4"))


@pytest.mark.usefixtures("quick")
def test_experts_of_two_shapes_are_measured_by_shape(tiny: Path, tmp_path: Path, config: EngineConfig) -> None:
    one = open_experts(tiny, config)
    two = open_experts(save_tiny(tmp_path / "other", moe_intermediate_size=48), config)
    mixed = replace(one, weights=lambda layer, expert: (two if layer == 1 else one).weights(layer, expert))

    found = calibrate(bench_of(mixed, config), mixed, config)

    first, second, third = found.costs.experts
    assert first == third
    assert first.nbytes < second.nbytes
    assert {held.shape for held in found.held_out} == {0, 1}


@pytest.mark.usefixtures("quick")
def test_a_curve_that_takes_too_long_ends_sooner(
    tiny: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TOO_LONG_S", -1.0)
    experts = open_experts(tiny, config)
    bench = bench_of(experts, config)

    costs = bench.measure([0]).costs

    assert [n for n, _ in costs.cpu.points] == [1.0]
    assert costs.cpu(64) == costs.cpu(1)


@pytest.mark.parametrize(
    ("seconds", "risen"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ([2.0, 1.0, 3.0], [1.5, 1.5, 3.0]),
        ([3.0, 2.0, 1.0], [2.0, 2.0, 2.0]),
        ([1.0, 4.0, 2.0, 3.0, 5.0], [1.0, 3.0, 3.0, 3.0, 5.0]),
        ([], []),
    ],
)
def test_times_that_fall_are_evened_out(seconds: list[float], risen: list[float]) -> None:
    assert [s for _, s in rising(list(enumerate(seconds)))] == risen
    assert [n for n, _ in rising(list(enumerate(seconds)))] == list(range(len(seconds)))


def test_what_is_typical_is_what_nothing_disturbed() -> None:
    assert typical([9.0, 1.0, 8.0]) == 1.0
    assert typical([float(n) for n in range(100)]) == 10.0


@pytest.mark.usefixtures("quick")
def test_the_command_measures_and_the_second_time_reads(tiny: Path) -> None:
    # anew, since another test may have stored a calibration of the same shape
    first, second = run("-m", tiny, "--device", "sim", "--anew"), run("-m", tiny, "--device", "sim")

    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert "experts of 24.58 kB, in 3 layers" in first.stdout
    for text in (
        "CPU \u03bcs",
        "slots \u03bcs",
        "GB/s",
        "(48)",
        "512",
        "GB/s alone",
        "times as long",
        "stored in ",
    ):
        assert text in first.stdout
    assert "now, in" in first.stdout
    assert "before; --anew measures again" in second.stdout


@pytest.mark.usefixtures("quick")
def test_on_the_cpu_there_are_no_slots_and_no_copies(tiny: Path) -> None:
    shown = run("-m", tiny, "--anew").stdout

    assert "CPU \u03bcs" in shown
    assert "slots" not in shown
    assert "copies" not in shown


@pytest.mark.usefixtures("quick")
def test_one_object_has_the_costs_and_the_residuals(tiny: Path) -> None:
    value, again = (run_json("-m", tiny, "--device", "sim") for _ in range(2))

    assert set(value) == {"model", "device", "file", "measured_now", "costs", "held_out"}
    assert json.loads(Path(value["file"]).read_text())["costs"] == value["costs"]
    assert {"error", "lane", "n_rows", "measured_s", "predicted_s"} <= set(value["held_out"][0])
    assert not again["measured_now"]
    assert again["costs"] == value["costs"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--device", "sim:laptop-4060"), "known: cpu, sim"),
        (("--device", "tpu"), "known: cpu, sim"),
        (("-m", "/nowhere"), "neither a checkpoint folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(args: tuple[object, ...], message: str) -> None:
    result = run(*args)

    assert result.exit_code == 1
    assert message in result.stderr


@pytest.fixture(autouse=True)
def _threads() -> Any:
    """Calibrating sets the calling thread's torch threads, as the engine sets its own."""
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)
