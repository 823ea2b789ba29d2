"""A calibration on a GPU: all that is measured there, with the engine's own jobs and steps, on a fake whose clock
counts what it does. So nothing here is about speed: what is measured, what it is kept under, what is left behind.
"""

import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio
import pytest
import torch
from typer.testing import CliRunner, Result

from fiddler import Engine
from fiddler.calibration import dense, measure
from fiddler.calibration import gpu as gpu_costing
from fiddler.calibration import gpu as measure_experts
from fiddler.calibration.costs import Calibration, calibrate
from fiddler.calibration.dense import Extent
from fiddler.calibration.gpu import GpuBench
from fiddler.calibration.measure import FITTED, HELD_OUT
from fiddler.calibration.sample import open_bench, open_experts
from fiddler.cli import app
from fiddler.config import EngineConfig
from fiddler.cost.model import CostModel
from fiddler.devices.kernels import Kernels
from fiddler.engine.assembly import Rig, assemble_rig
from fiddler.gpu import cuda
from fiddler.gpu.jobs import GpuJobs
from fiddler.models import loaded as models
from fiddler.models.kv import KvArena
from fiddler.models.loaded import load
from fiddler.scheduler.messages import RunExperts
from tests.support.covering import covering, spread
from tests.support.fake_gpu import FakeGpu
from tests.support.tiny import CONTEXT, N_EXPERTS, N_LAYERS, save_tiny

KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure less: what comes out is not looked at. Calibrating sets the calling thread's torch threads."""
    monkeypatch.setattr(measure, "CURVE_S", 0.0)
    monkeypatch.setattr(measure, "LEAST", 2)
    monkeypatch.setattr(measure, "BESIDE_S", 0.01)
    monkeypatch.setattr(dense, "STEPS_S", 0.0)
    monkeypatch.setattr(dense, "LEAST_STEPS", 1)
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(device="cuda", kernels="linear", calibration_dir=tmp_path / "calibrations")


@contextmanager
def found(gpu: FakeGpu) -> Iterator[None]:
    """Let `device="cuda"` find a fake."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(cuda, "open_gpu", lambda: gpu))
        stack.enter_context(patch.object(torch.cuda, "is_available", lambda: True))
        yield


def calibrated(model: Path, config: EngineConfig, gpu: FakeGpu | None = None, *, anew: bool = False) -> Calibration:
    with found(gpu or FakeGpu(1)):
        loaded = open_experts(model, config)
        with open_bench(loaded, config) as bench:
            return calibrate(bench, loaded, config, anew=anew)


def rig_on(model: Path, config: EngineConfig, gpu: FakeGpu) -> Rig:
    """Return an engine's rig, whose lanes have ended."""
    with found(gpu):
        rig = assemble_rig(load(model, config), Kernels(), config)
    rig.close()
    return rig


def rises(points: tuple[tuple[float, float], ...]) -> bool:
    seconds = [s for _, s in points]
    return seconds == sorted(seconds) and seconds[0] > 0.0


def assert_whole(costs: CostModel) -> None:
    """Every kind of cost is there."""
    assert len(costs.experts) == N_LAYERS
    for expert in costs.experts:
        assert [n for n, _ in expert.cpu.points] == [n for n, _ in expert.gpu.points] == list(FITTED)
        assert rises(expert.cpu.points)
        assert rises(expert.gpu.points)
        assert expert.copy_s > 0.0
        assert expert.nbytes > 0
    assert costs.contention.cpu >= 1.0 <= costs.contention.link
    assert costs.moves.fixed_s > 0.0 <= costs.moves.row_s
    assert [n for n, _ in costs.dense.rows.points] == [n for n, _ in costs.dense.head.points]
    assert rises(costs.dense.rows.points)
    assert rises(costs.dense.head.points)
    assert costs.dense.context_s >= 0.0
    assert costs.dense.layer_s(4, 4096) >= costs.dense.layer_s(1, 0) > 0.0
    assert costs.host_s > 0.0


@pytest.mark.parametrize(("kind", "seed"), spread([KINDS], [1, 2]))
def test_every_kind_of_cost_is_measured(kind: str, seed: int, tmp_path: Path, config: EngineConfig) -> None:
    gpu = FakeGpu(seed)
    result = calibrated(save_tiny(tmp_path / kind, kind), config, gpu)

    assert result.fresh
    assert_whole(result.costs)
    assert [n for n, _ in result.costs.dense.rows.points] == [1, 4, 16, 64, 256]
    assert gpu.n_graphs > 0
    assert {(h.lane, h.n_rows) for h in result.held_out} == {(ln, n) for ln in ("cpu", "gpu") for n in HELD_OUT}
    for held in result.held_out:
        assert held.measured_s > 0.0
        assert held.predicted_s == getattr(result.costs.experts[0], held.lane)(held.n_rows)


def test_a_model_that_shares_no_forwards_is_measured_one_by_one(
    tiny: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "PACKED", frozenset())
    gpu = FakeGpu(3)
    result = calibrated(tiny, config, gpu)

    assert_whole(result.costs)
    assert gpu.n_graphs == 0


def test_without_graphs_nothing_is_recorded(tiny: Path, config: EngineConfig) -> None:
    for options in ({"graphs": False}, {"defer": 1}):
        gpu = FakeGpu(4)
        assert_whole(calibrated(tiny, replace(config, **options), gpu).costs)
        assert gpu.n_graphs == 0


def test_what_is_stored_is_read_back_and_measured_again_on_request(tiny: Path, config: EngineConfig) -> None:
    measured, read = calibrated(tiny, config), calibrated(tiny, config)

    assert (measured.fresh, read.fresh) == (True, False)
    assert read == replace(measured, fresh=False)
    assert json.loads(measured.file.read_text())["costs"]["host_s"] == measured.costs.host_s
    assert calibrated(tiny, config, anew=True).fresh


def test_other_gpus_and_other_dense_parts_are_measured_apart(
    tiny: Path, tmp_path: Path, config: EngineConfig
) -> None:
    other = FakeGpu(1)
    other.name = "another GPU"
    wider = save_tiny(tmp_path / "wider", num_attention_heads=8)
    files = [
        calibrated(tiny, config).file,
        calibrated(tiny, config, other).file,
        calibrated(wider, config).file,
        calibrated(tiny, config, FakeGpu(1, pinnable=0)).file,
        calibrated(tiny, replace(config, kv_tokens=64)).file,
        calibrated(tiny, replace(config, graphs=False)).file,
        calibrated(tiny, replace(config, prefetch="off")).file,
        calibrated(tiny, replace(config, device="cpu")).file,
        calibrated(tiny, replace(config, device="sim")).file,
    ]

    assert len(set(files)) == len(files)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_finds_what_was_measured_for_it(kind: str, tmp_path: Path, config: EngineConfig) -> None:
    model = save_tiny(tmp_path / kind, kind)
    measured = calibrated(model, config)

    with patch.object(gpu_costing.GpuBench, "measure", side_effect=AssertionError("measured again")):
        rig = rig_on(model, config, FakeGpu(2))

    assert rig.side.costs == measured.costs


def test_an_engine_measures_for_itself_and_is_left_as_it_was(tiny: Path, config: EngineConfig) -> None:
    gpu, arenas = FakeGpu(5, pinnable=1 << 40), list[weakref.ref[KvArena]]()

    def arena(n_tokens: int) -> KvArena:
        made = KvArena(n_tokens)
        arenas.append(weakref.ref(made))
        return made

    with patch.object(gpu_costing, "KvArena", arena):
        rig = rig_on(tiny, replace(config, slots=7), gpu)

    assert_whole(rig.side.costs)
    jobs = rig.side.work
    assert isinstance(jobs, GpuJobs)
    assert not jobs._landing
    assert not jobs._read
    assert all(counters.n_loads == counters.n_rows == 0 for counters in jobs.counters.values())
    jobs.copying.arena.check()
    assert rig.scheduler.cache.n_free == 7
    assert rig.steps.arena is not None
    assert rig.steps.arena.nbytes == 0  # its memory is made when rows come
    rig.steps.arena.check()
    assert gpu._pinnable == 1 << 40
    gc.collect()
    assert [ref() for ref in arenas] == [None]


@pytest.mark.parametrize("slots", [0, 1, 7, 24])
def test_tokens_after_a_calibration_are_those_of_the_cpu(tiny: Path, config: EngineConfig, slots: int) -> None:
    async def generate(config: EngineConfig) -> tuple[int, ...]:
        async with Engine(tiny, config) as engine:
            result = await engine.generate([5, 6, 7, 8, 9], max_new_tokens=12, do_sample=False)
            return result.token_ids

    expected = anyio.run(partial(generate, replace(config, device="cpu")))
    with found(FakeGpu(6)):
        assert anyio.run(partial(generate, replace(config, slots=slots, kv_tokens=64, graphs=False))) == expected


def test_without_slots_there_is_no_link_to_measure(tiny: Path, config: EngineConfig) -> None:
    costs = rig_on(tiny, replace(config, slots=0), FakeGpu(1)).side.costs

    for expert in costs.experts:
        assert expert.copy_s == 0.0
        assert expert.gpu == expert.cpu
    assert rises(costs.dense.rows.points)
    assert costs.moves.fixed_s > 0.0
    assert costs.host_s > 0.0


def test_a_block_that_is_not_pinned_goes_through_the_ring(tiny: Path, config: EngineConfig) -> None:
    copied = measure_experts.GpuJobs.copy
    ways = list[tuple[int, bool]]()

    def copy(self: GpuJobs, job: Any) -> Any:
        ways.append((job.layer, self.pageable(job)))
        return copied(self, job)

    some = N_EXPERTS * 3 * 64 * 32 * 4 + 1  # the experts of one layer
    with patch.object(GpuJobs, "copy", copy):
        costs = rig_on(tiny, config, FakeGpu(1, pinnable=some)).side.costs

    assert {(0, False), (1, True), (2, True)} <= set(ways)
    assert (0, True) not in ways
    assert (1, False) not in ways
    assert costs.experts[1] == costs.experts[2] != costs.experts[0]
    assert_whole(costs)


def test_experts_of_a_run_share_its_launches(tiny: Path, config: EngineConfig) -> None:
    jobs, launched = list[RunExperts](), GpuJobs.launch

    def launch(self: GpuJobs, job: RunExperts) -> Any:
        jobs.append(job)
        return launched(self, job)

    with patch.object(GpuJobs, "launch", launch):
        calibrated(tiny, config)

    by_rows = {n: {len(j.loads) for j in jobs if j.loads[0].n_rows == n} for n in (*FITTED, *HELD_OUT)}
    assert by_rows == {n: {max(1, min(4, 512 // n))} for n in by_rows}
    assert all(len(set(job.slots)) == len(job.loads) for job in jobs)
    assert {slot for job in jobs for slot in job.slots} == set(range(N_LAYERS * N_EXPERTS))
    assert {load.n_rows for job in jobs for load in job.loads} == {*FITTED, *HELD_OUT}


def extent(room: int, config: EngineConfig, *, packed: bool = True, context: int = CONTEXT) -> Extent:
    loaded: Any = type("Loaded", (), {"packed": packed, "rotary": None, "resolved": None})
    with patch.object(torch.cuda, "is_available", lambda: True):
        loaded.resolved = models.resolve(
            replace(config, kv_tokens=room), checkpoint_dtype="float32", model_context=context, has_cuda=True
        )
    return Extent.of(loaded, config)


@pytest.mark.parametrize(
    ("room", "context", "packed"),
    covering([1, 2, 3, 17, 64, 256, 1000, 32768], [1, 64, CONTEXT, 1 << 17], [False, True]),
)
def test_no_more_tokens_are_held_than_an_engine_may(
    room: int, context: int, packed: bool, config: EngineConfig
) -> None:
    what = extent(room, config, packed=packed, context=context)

    assert what.most <= room
    assert max(what.chunks, default=0) <= min(room, context)
    for n_rows in what.decoding:
        contexts = what.contexts(n_rows)
        assert 2 <= contexts[0] <= contexts[-1] <= min(context, room // n_rows)
        assert len(contexts) == 1 or contexts[1] >= 2 * contexts[0]
    assert bool(what.decoding) == (min(room, context) > 1)


def test_a_long_context_is_measured_over_as_many_tokens_whoever_shares_it(config: EngineConfig) -> None:
    what = extent(32768, config, context=1 << 17)

    assert {n: what.contexts(n) for n in what.decoding} == {1: (256, 8192), 4: (256, 2048), 16: (256, 512)}
    assert what.chunks == (64, 256)


@pytest.mark.parametrize("kv_tokens", [2, 5, 64])
def test_a_small_room_is_measured_as_far_as_it_goes(tiny: Path, config: EngineConfig, kv_tokens: int) -> None:
    costs = calibrated(tiny, replace(config, kv_tokens=kv_tokens)).costs

    assert rises(costs.dense.rows.points)
    assert costs.dense.context_s == 0.0


def test_where_nothing_can_decode_the_dense_part_is_unknown(tiny: Path, config: EngineConfig) -> None:
    costs = calibrated(tiny, replace(config, kv_tokens=1)).costs

    assert costs.dense.layer_s(1, 1) == costs.host_s == 0.0
    assert costs.experts[0].copy_s > 0.0


def test_a_step_that_fails_ends_the_calibration_and_holds_nothing(
    tiny: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, arenas = FakeGpu(1, pinnable=1 << 40), list[KvArena]()

    def arena(n_tokens: int) -> KvArena:
        arenas.append(KvArena(n_tokens))
        return arenas[-1]

    def measured_anyway(self: GpuBench, layers: Any) -> Any:
        norm = self.loaded.model.get_submodule("model.layers.2.input_layernorm")
        norm.register_forward_hook(fail)
        return measure_experts.GpuExperts.measure(self.experts, layers)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(gpu_costing, "KvArena", arena)
    monkeypatch.setattr(GpuBench, "measure", measured_anyway)
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        calibrated(tiny, config, gpu)

    assert arenas[0].n_free == arenas[0].n_tokens
    arenas[0].check()
    assert gpu._pinnable == 1 << 40
    assert config.calibration_dir is not None
    assert not list(config.calibration_dir.glob("costs-*"))


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, args)], env={"COLUMNS": "200"})


def test_the_command_measures_a_gpu_and_the_second_time_reads(tiny: Path) -> None:
    gpu = FakeGpu(1)
    gpu.name = "the command's"
    with found(gpu):
        first, second = (run("-m", tiny, "--device", "cuda") for _ in range(2))
        value = json.loads(run("-m", tiny, "--device", "cuda", "--json").stdout)

    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    for text in ("slots μs", "GB/s alone", "moves", "dense part", "a token of context", "output head", "host"):
        assert text in first.stdout
    assert "now, in" in first.stdout
    assert "before; --anew measures again" in second.stdout
    assert value["device"] == "cuda"
    assert value["costs"]["host_s"] > 0.0
    assert not value["measured_now"]


def test_without_a_gpu_the_command_says_so(tiny: Path) -> None:
    with patch.object(torch.cuda, "is_available", lambda: False):
        result = run("-m", tiny, "--device", "cuda")

    assert result.exit_code == 1
    assert "torch sees no CUDA device" in result.stderr
