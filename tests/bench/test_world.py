"""What the world check assumes says where it comes from; its arithmetic is right on made-up cases."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from bench.world import WORLD, Cell, Predictor, World, invert, order_right
from fiddler.lab.machine import FIGURES, machines
from fiddler.lab.systems import SYSTEMS

KINDS = re.compile(r"(measured|derived|assumed): ")
PARTS = ("constants", "machines", "models", "systems", "lengths")


def content() -> dict[str, Any]:
    return dict(json.loads(WORLD.read_text(encoding="utf-8")))


def constants(found: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(found, dict) and "value" in found:
        yield path, found
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from constants(value, f"{path}/{key}")


@pytest.fixture
def world() -> World:
    return World.load()


def cell_of(world: World, name: str, machine: str, model: str = "mixtral-8x7b") -> Cell:
    return next(c for c in world.cells if (c.system, c.machine, c.model) == (name, machine, model))


class TestFile:
    def test_every_constant_says_where_it_comes_from(self) -> None:
        named = [one for part in PARTS for one in constants(content()[part], part)]
        assert len(named) > 40
        assert [path for path, one in named if one.keys() != {"value", "source"}] == []
        assert [path for path, one in named if not KINDS.match(one["source"])] == []

    def test_every_published_speed_says_who_states_it(self, world: World) -> None:
        assert len(world.cells) == 22
        assert all(re.search(r"arXiv |https://", cell.source) for cell in world.cells)

    def test_names_only_what_there_is(self, world: World) -> None:
        for cell in world.cells:
            assert cell.system in world.systems
            assert cell.system in SYSTEMS or cell.system == "deepspeed-mii"
            assert cell.machine in machines()
            assert cell.machine in world.machines
            assert cell.lengths in world.lengths
            assert 0 <= cell.slots <= world.shape(cell.model).total_experts

    def test_a_system_s_constants_are_figures_of_a_machine_or_known_by_name(self, world: World) -> None:
        others = {"cpu_share", "cpu_share_4bit", "host_resident_s", "link_passes", "order", "prefetch", "streamed"}
        assert {name for own in world.systems.values() for name in own} <= FIGURES | others

    def test_a_correction_gives_both_results(self) -> None:
        assert all(one.keys() >= {"what", "before", "after"} for one in content()["corrections"])

    def test_fifteen_lengths_are_fifteen(self, world: World) -> None:
        fifteen = world.lengths["fifteen"]
        assert len({tuple(lengths) for lengths in fifteen}) == 15
        assert [32, 256] in fifteen


class TestMachine:
    def test_a_system_s_constants_take_the_machine_s_place(self, world: World) -> None:
        cell = cell_of(world, "fiddler-2024", "fiddler-env1")
        found = Predictor(world).machine(cell, "assumed", 0.5)
        assert found.cpu_read_bytes_per_s == pytest.approx(64e9)
        assert found.host_layer_s == world.systems["fiddler-2024"]["host_layer_s"]
        assert found.gpu_read_bytes_per_s == 537.6e9

    def test_by_the_data_sheet_nothing_but_bytes_and_operations_takes_time(self, world: World) -> None:
        cell = cell_of(world, "fiddler-2024", "fiddler-env1")
        found = Predictor(world).machine(cell, "data sheet", None)
        assert (found.cpu_read_bytes_per_s, found.gpu_read_bytes_per_s) == (128e9, 672e9)
        assert {found.host_layer_s, found.dense_launch_s, found.gpu_expert_launch_s, found.move_fixed_s} == {0.0}

    def test_copies_out_halve_the_rate_of_copies_in(self, world: World) -> None:
        cell = cell_of(world, "mixtral-offloading", "fiddler-env1")
        assert Predictor(world).machine(cell, "assumed", None).link_bytes_per_s == 6e9

    def test_cpu_and_link_slow_each_other_down_only_where_both_want_more_than_there_is(self, world: World) -> None:
        predictor, cell = Predictor(world), cell_of(world, "hybrimoe", "hybrimoe-a6000", "mixtral-8x7b-4bit")
        assert predictor.machine(cell, "assumed", 0.35).cpu_slowdown_beside_link == 1.0
        left = 0.777 * 128e9 - 12e9
        slowed = predictor.machine(cell, "assumed", 0.75).cpu_slowdown_beside_link
        assert slowed == pytest.approx(0.75 * 128e9 / left)

    def test_experts_on_the_gpu_that_are_asked_one_by_one_cost_the_host_time(self, world: World) -> None:
        cell = cell_of(world, "ktransformers", "hybrimoe-a6000", "mixtral-8x7b-4bit")
        own = world.systems["ktransformers"]
        found = Predictor(world).machine(cell, "assumed", 0.35)
        assert cell.slots == 64
        assert found.host_layer_s == pytest.approx(own["host_layer_s"] + 2 * own["host_resident_s"])

    def test_attention_on_the_cpu_is_read_at_its_rate(self, world: World) -> None:
        cell = cell_of(world, "llama.cpp", "fiddler-env1")
        predictor, own = Predictor(world), world.systems["llama.cpp"]["host_layer_s"]
        nbytes = world.shape(cell.model).dense_bytes
        extra = 24 / 32 * (nbytes / 64e9 - nbytes / 537.6e9)
        assert predictor.machine(cell, "assumed", 0.5).host_layer_s == pytest.approx(own + extra)
        assert predictor.machine(replace(cell, gpu_layers=32), "assumed", 0.5).host_layer_s == pytest.approx(own)


class TestPredict:
    def test_a_short_run(self, world: World) -> None:
        cell = replace(cell_of(world, "fiddler-2024", "fiddler-env1"), lengths="short")
        world = replace(world, lengths={"short": [[4, 3]]})
        found = Predictor(world).predict(cell, "assumed", 0.4)
        slower = Predictor(world).predict(cell, "assumed", 0.2)
        assert 0.1 < slower.tokens_per_s < found.tokens_per_s < 10.0
        assert 0.0 < found.hits < 1.0

    def test_streaming_copies_every_weight_for_every_token(self, world: World) -> None:
        cell = cell_of(world, "deepspeed-mii", "fiddler-env1")
        found = Predictor(world).predict(cell, "assumed", None)
        assert found.tokens_per_s == pytest.approx(12e9 / 93.4e9, rel=0.01)

    @pytest.mark.parametrize("share", [0.4, 0.16, 4 / 3])
    def test_an_implied_share_is_found_again(self, share: float) -> None:
        # 0.05 s of something else, and what the CPU reads: 0.2 s at 0.4 of the bandwidth, so 0.08 s at all of it.
        found = invert(lambda s: 1.0 / (0.05 + 0.08 / s), 1.0 / (0.05 + 0.08 / share), 0.4)
        assert found == pytest.approx(share, rel=0.02)

    def test_no_cpu_is_fast_enough_where_the_rest_takes_longer(self) -> None:
        assert invert(lambda s: 1.0 / (0.05 + 0.08 / s), 21.0, 0.4) is None
        assert invert(lambda s: 3.0, 4.0, 0.4) is None


@pytest.mark.parametrize(
    ("speeds", "right"),
    [
        ([(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)], True),
        ([(1.0, 10.0), (2.0, 9.0), (3.0, 30.0)], False),
        ([(1.0, 10.0), (1.0, 9.0), (3.0, 30.0)], True),
        ([(1.0, 10.0), (2.0, 10.0)], False),
        ([(1.0, 10.0)], True),
    ],
    ids=str,
)
def test_an_order_is_right_if_every_pair_is(speeds: list[tuple[float, float]], right: bool) -> None:
    assert order_right(speeds) is right
