"""Machines say where each figure comes from, and a cost model is those figures and nothing else."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fiddler.cost.model import Contention, CostModel
from fiddler.errors import ConfigError
from fiddler.formats.quantise import TARGETS, quantise
from fiddler.lab.machine import (
    FIGURES,
    FOLDER,
    RESERVE_BYTES,
    Machine,
    _expert_on,
    cost_model,
    expert_costs,
    machines,
    n_slots,
    packed_curve,
)
from fiddler.lab.shape import ModelShape
from fiddler.types import ExpertWeights
from tests.support.covering import spread

ROOT = Path(__file__).parent.parent.parent
SLOWDOWNS = ("cpu_slowdown_beside_link", "link_slowdown_beside_cpu")
TIMES = ("host_layer_s", "move_fixed_s", "dense_launch_s", "gpu_expert_launch_s", "cpu_expert_dispatch_s")
KINDS = re.compile(r"https://|arXiv |derived: |measured: |assumed: ")

ROUND = Machine(
    name="round",
    description="figures that are easy to divide by",
    cpu_read_bytes_per_s=50e9,
    cpu_flop_per_s=1e12,
    cpu_decode_weights_per_s=200e9,
    link_bytes_per_s=10e9,
    cpu_slowdown_beside_link=1.25,
    link_slowdown_beside_cpu=1.1,
    gpu_read_bytes_per_s=500e9,
    gpu_flop_per_s=100e12,
    gpu_bytes=24e9,
    host_bytes=200e9,
    gpu_expert_launch_s=20e-6,
    cpu_expert_dispatch_s=50e-6,
    dense_launch_s=90e-6,
    host_layer_s=100e-6,
    move_fixed_s=25e-6,
)


@pytest.fixture
def mixtral() -> ModelShape:
    return ModelShape.load("mixtral-8x7b")


def written(folder: Path, **changes: Any) -> Path:
    """A copy of a shipped machine with keys changed, or left out where `None`."""
    values = json.loads((FOLDER / "fiddler-env1.json").read_text()) | changes
    path = folder / "mine.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


class TestShipped:
    def test_are_these(self) -> None:
        assert machines() == [
            "fiddler-env1",
            "fiddler-env2",
            "h100-server",
            "hybrimoe-a6000",
            "laptop-4060",
            "rtx4090-desktop",
        ]

    @pytest.mark.parametrize("name", machines())
    def test_every_figure_says_where_it_comes_from(self, name: str) -> None:
        machine = Machine.load(name)
        assert machine.name == name
        assert machine.description
        assert machine.sources.keys() == FIGURES
        assert not [figure for figure, source in machine.sources.items() if not KINDS.search(source)]

    @pytest.mark.parametrize("name", machines())
    def test_the_cpu_loses_what_the_link_takes(self, name: str) -> None:
        machine = Machine.load(name)
        left = machine.cpu_read_bytes_per_s - machine.link_bytes_per_s
        assert machine.cpu_slowdown_beside_link == pytest.approx(machine.cpu_read_bytes_per_s / left, abs=1e-3)

    @pytest.mark.parametrize("name", machines())
    def test_a_gpu_is_faster_than_its_cpu_and_its_link(self, name: str) -> None:
        machine = Machine.load(name)
        assert machine.gpu_read_bytes_per_s > machine.cpu_read_bytes_per_s > machine.link_bytes_per_s
        assert machine.gpu_flop_per_s > machine.cpu_flop_per_s

    def test_are_where_bench_looks(self) -> None:
        link = ROOT / "bench" / "machines"
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == FOLDER.resolve()


class TestLoad:
    def test_takes_a_path(self, tmp_path: Path) -> None:
        machine = Machine.load(written(tmp_path, gpu_bytes={"value": 1e9, "source": "assumed: little"}))
        assert (machine.name, machine.gpu_bytes, machine.sources["gpu_bytes"]) == ("mine", 1e9, "assumed: little")

    def test_names_what_there_is(self) -> None:
        with pytest.raises(ConfigError, match=r"no profile 'toaster'; .*fiddler-env1, fiddler-env2, h100-server"):
            Machine.load("toaster")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"gpu_byte": 3}, "unknown key gpu_byte"),
            ({"gpu_bytes": None, "host_bytes": None}, "missing key gpu_bytes, host_bytes"),
            ({"description": None}, "missing key description"),
            ({"description": ""}, "description: must be a text"),
            ({"gpu_bytes": 3e9}, "gpu_bytes: must be a JSON object"),
            ({"gpu_bytes": {"value": 3e9}}, "gpu_bytes: missing key source"),
            ({"gpu_bytes": {"value": 3e9, "source": " "}}, "gpu_bytes: source: must be a text"),
            ({"gpu_bytes": {"source": "assumed: x"}}, "gpu_bytes: missing key value"),
            ({"gpu_bytes": {"value": 1, "source": "assumed: x", "unit": "B"}}, "gpu_bytes: unknown key unit"),
            (
                {"gpu_bytes": {"value": "24 GB", "source": "assumed: x"}},
                "gpu_bytes='24 GB' must be a finite number",
            ),
            ({"link_bytes_per_s": {"value": 0, "source": "assumed: x"}}, "link_bytes_per_s=0 must be above 0"),
        ],
        ids=str,
    )
    def test_names_the_file_and_the_key(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=f"mine.json: {re.escape(message)}"):
            Machine.load(written(tmp_path, **changes))

    @pytest.mark.parametrize("content", ["{", "[]", "\x00"], ids=repr)
    def test_refuses_what_is_no_json_object(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "mine.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"mine\.json: .*JSON"):
            Machine.load(path)


class TestFigures:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *product(sorted(FIGURES), [-1.0]),
            *spread(
                [SLOWDOWNS, TIMES, sorted(FIGURES - {*SLOWDOWNS, *TIMES})],
                [float("nan"), float("inf"), True, "1", None],
            ),
        ],
        ids=repr,
    )
    def test_impossible_ones_are_refused(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"^{name}="):
            replace(ROUND, **{name: value})

    @pytest.mark.parametrize("name", SLOWDOWNS)
    def test_nothing_is_faster_beside_another(self, name: str) -> None:
        with pytest.raises(ConfigError, match="must be at least 1"):
            replace(ROUND, **{name: 0.99})

    @pytest.mark.parametrize("name", TIMES)
    def test_a_time_may_be_nothing(self, name: str) -> None:
        assert getattr(replace(ROUND, **{name: 0.0}), name) == 0.0


class TestCostModel:
    def test_of_mixtral_by_hand(self, mixtral: ModelShape) -> None:
        costs = cost_model(mixtral, ROUND)
        (expert,) = set(costs.experts)
        assert len(costs.experts) == 32
        assert expert.nbytes == 352_321_536
        assert expert.copy_s == pytest.approx(0.0352321536)
        assert expert.cpu(1) == pytest.approx(50e-6 + 352_321_536 / 50e9)
        assert expert.gpu(1) == pytest.approx(20e-6 + 352_321_536 / 500e9)
        assert costs.contention == Contention(1.25, 1.1)
        assert costs.moves.fixed_s == 25e-6
        assert costs.moves.row_s == pytest.approx(2 * 4096 * 2 / 10e9)
        assert costs.host_s == 100e-6

    def test_an_expert_is_read_once_until_its_arithmetic_takes_longer(self, mixtral: ModelShape) -> None:
        # Two bytes and two operations a weight: the knee is at operation rate / read rate, 20 and 200 rows.
        (expert,) = set(cost_model(mixtral, ROUND).experts)
        assert expert.cpu(19) == pytest.approx(expert.cpu(1))
        assert expert.cpu(100) == pytest.approx(50e-6 + 100 * mixtral.expert_flops_per_row / 1e12)
        assert expert.gpu(199) == pytest.approx(expert.gpu(1))
        assert expert.gpu(1000) == pytest.approx(20e-6 + 1000 * mixtral.expert_flops_per_row / 100e12)

    def test_the_dense_part_by_hand(self, mixtral: ModelShape) -> None:
        dense = cost_model(mixtral, ROUND).dense
        assert dense.layer_s(1, 0) == pytest.approx(90e-6 + 83_951_616 / 500e9)
        assert dense.layer_s(1, 1000) - dense.layer_s(1, 0) == pytest.approx(1000 * 4096 / 500e9)
        assert dense.layer_s(5000, 0) == pytest.approx(90e-6 + 5000 * 83_951_616 / 100e12)
        assert dense.head(1) == pytest.approx(90e-6 + 262_144_000 / 500e9)

    def test_layers_without_experts_are_shared_among_the_others(self) -> None:
        shape = ModelShape.load("deepseek-v2-lite")
        dense = cost_model(shape, ROUND).dense
        whole = 27 * 90e-6 + 2 * (26 * shape.dense_weights + shape.plain_weights) / 500e9
        assert 26 * dense.rows(1) == pytest.approx(whole)
        assert 26 * dense.context_s == pytest.approx(27 * 1152 / 500e9)

    @pytest.mark.parametrize("name", machines())
    def test_survives_being_written_down(self, name: str, mixtral: ModelShape) -> None:
        costs = cost_model(mixtral, Machine.load(name))
        assert CostModel.from_json(json.loads(json.dumps(costs.as_json()))) == costs

    def test_a_copy_on_the_paper_s_first_machine(self, mixtral: ModelShape) -> None:
        (expert,) = set(cost_model(mixtral, Machine.load("fiddler-env1")).experts)
        assert expert.copy_s == pytest.approx(352_321_536 / 12e9)


class TestPackedExperts:
    def test_take_their_bytes_and_their_decoding(self, mixtral: ModelShape) -> None:
        stored = mixtral.stored_as("mxfp4")
        (expert,) = set(cost_model(stored, ROUND).experts)
        nbytes, n_weights = 3 * 4096 * 14336 * 17 // 32, 3 * 4096 * 14336
        assert expert.nbytes == nbytes
        assert expert.copy_s == pytest.approx(nbytes / 10e9)
        assert expert.gpu(1) == pytest.approx(20e-6 + nbytes / 500e9)
        assert expert.cpu(1) == pytest.approx(50e-6 + nbytes / 50e9 + n_weights / 200e9)

    def test_are_decoded_again_every_sixteen_rows_until_it_pays_to_decode_them_whole(
        self, mixtral: ModelShape
    ) -> None:
        (expert,) = set(cost_model(mixtral.stored_as("mxfp4"), ROUND).experts)
        nbytes, n_weights = expert.nbytes, mixtral.expert_weights
        assert expert.cpu(32) == pytest.approx(50e-6 + 32 * n_weights * (2 / 1e12 + 1 / 16 / 200e9))
        once = nbytes / 50e9 + n_weights / 200e9 + 4 * n_weights / 50e9
        assert expert.cpu(1000) == pytest.approx(50e-6 + once + 1000 * 2 * n_weights / 1e12)

    def test_are_known_by_their_bytes_when_a_model_is_loaded(self) -> None:
        numbers = torch.ones(64, 64)
        packed, plain = quantise(numbers, TARGETS["fp8"]), numbers.bfloat16()
        found = _expert_on(ROUND, ExpertWeights((packed, packed), packed))
        assert found == expert_costs(ROUND, 3 * (64 * 64 + 64 * 2), 2.0 * 3 * 64 * 64, packed=True)
        floats = _expert_on(ROUND, ExpertWeights((plain, plain), plain))
        assert floats == expert_costs(ROUND, 3 * 64 * 64 * 2, 2.0 * 3 * 64 * 64)

    @pytest.mark.parametrize("name", machines())
    @pytest.mark.parametrize("quant", ["fp8", "int4"])
    def test_more_rows_never_take_less(self, name: str, quant: str, mixtral: ModelShape) -> None:
        (expert,) = set(cost_model(mixtral.stored_as(quant), Machine.load(name)).experts)
        seconds = [expert.cpu(n) for n in range(1, 600)]
        assert seconds == sorted(seconds)

    def test_one_row_takes_as_long_as_was_measured(self) -> None:
        """On the machine that the shipped machines' figure comes from: 15 weights a cycle of two cores."""
        measured = json.loads((ROOT / "bench/results/packed-2core-epyc.json").read_text())
        here = replace(
            ROUND,
            cpu_read_bytes_per_s=measured["read_ceiling_gbs"] * 1e9,
            cpu_decode_weights_per_s=2 * 15 * 3.7e9,
            cpu_expert_dispatch_s=0.0,
        )
        sizes = measured["settings"]["shapes"]
        found = []
        for cell in measured["experts"]:
            if cell["n_rows"] == 1 and cell["format"] != "bf16":
                hidden, inner, _ = sizes[cell["model"]]
                nbytes = round(cell["us"] * cell["gbs"]["high"] * 1e3)
                found.append(packed_curve(here, nbytes, 6.0 * hidden * inner)(1) / cell["us"] * 1e6)
        assert len(found) == 27
        assert 0.65 < min(found) < 1.0 < max(found) < 1.4


class TestSlots:
    def test_of_packed_experts_are_as_many_times_more(self, mixtral: ModelShape) -> None:
        left = n_slots(mixtral, ROUND, vram_bytes=24e9) * mixtral.expert_bytes
        packed = mixtral.stored_as("int4")
        assert n_slots(packed, ROUND, vram_bytes=24e9) >= left // packed.expert_bytes > 3 * 52

    @pytest.mark.parametrize(("share", "slots"), [(0.0, 0), (0.25, 64), (0.37, 95), (1.0, 256)])
    def test_of_a_share(self, mixtral: ModelShape, share: float, slots: int) -> None:
        assert n_slots(mixtral, ROUND, share=share) == slots

    def test_that_fit_by_hand(self, mixtral: ModelShape) -> None:
        taken = 32 * 83_951_616 + 2 * 262_144_000 + 8192 * 32 * 4096 + RESERVE_BYTES
        assert n_slots(mixtral, ROUND) == (24_000_000_000 - taken) // 352_321_536 == 52
        assert n_slots(mixtral, ROUND, vram_bytes=taken + 352_321_536) == 1
        assert n_slots(mixtral, ROUND, vram_bytes=taken + 352_321_535) == 0

    def test_make_room_for_a_longer_context(self, mixtral: ModelShape) -> None:
        assert n_slots(mixtral, ROUND, context=0) > n_slots(mixtral, ROUND) > n_slots(mixtral, ROUND, context=65536)

    def test_are_never_more_than_there_are_experts(self, mixtral: ModelShape) -> None:
        assert n_slots(mixtral, ROUND, vram_bytes=1e12) == 256

    def test_need_room_for_the_dense_part_first(self, mixtral: ModelShape) -> None:
        with pytest.raises(ConfigError, match=r"mixtral-8x7b needs 5\.4 GB .* 4\.0 GB are there"):
            n_slots(mixtral, ROUND, vram_bytes=4e9)

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
    def test_a_share_is_between_nothing_and_all(self, mixtral: ModelShape, share: float) -> None:
        with pytest.raises(ConfigError, match=r"share=.* must be between 0 and 1"):
            n_slots(mixtral, ROUND, share=share)

    def test_a_share_and_a_size_contradict_each_other(self, mixtral: ModelShape) -> None:
        with pytest.raises(ConfigError, match="without vram_bytes"):
            n_slots(mixtral, ROUND, share=0.5, vram_bytes=1e9)
