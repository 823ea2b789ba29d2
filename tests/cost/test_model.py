"""The cost model: sums over experts, and the way to JSON and back."""

import json

import pytest

from fiddler.cost.model import Contention, CostModel, Curve, Dense, ExpertCosts, Moves

SMALL = ExpertCosts(Curve(((1.0, 2.0), (2.0, 3.0))), Curve(((1.0, 0.5),)), copy_s=4.0, nbytes=100)
LARGE = ExpertCosts(SMALL.cpu.scaled(2.0), SMALL.gpu.scaled(2.0), copy_s=8.0, nbytes=200)
MODEL = CostModel(
    experts=(SMALL, LARGE, SMALL),
    contention=Contention(cpu=1.25, link=1.5),
    moves=Moves(fixed_s=0.25, row_s=0.125),
    dense=Dense(Curve(((1.0, 1.0), (8.0, 2.0))), context_s=0.001, head=Curve(((1.0, 3.0),))),
    host_s=0.01,
)


def test_a_layers_seconds_are_of_its_experts() -> None:
    assert MODEL.cpu_s(0, [1, 2]) == 0.25 + (2.0 + 0.125) + (3.0 + 0.25)
    assert MODEL.cpu_s(1, [1]) == 0.25 + 4.0 + 0.125
    assert MODEL.gpu_s(0, [1, 2]) == 1.0


def test_without_loads_there_are_no_moves() -> None:
    assert MODEL.cpu_s(0, []) == 0.0
    assert MODEL.gpu_s(0, []) == 0.0


def test_the_dense_part_grows_with_rows_and_context() -> None:
    assert MODEL.dense.layer_s(8, 1000) == 3.0


@pytest.mark.parametrize("model", [MODEL, CostModel((SMALL,))])
def test_json_and_back(model: CostModel) -> None:
    value = model.as_json()
    assert CostModel.from_json(value) == model
    assert CostModel.from_json(json.loads(json.dumps(value))) == model


def test_equal_shapes_are_written_once() -> None:
    value = MODEL.as_json()
    assert len(value["shapes"]) == 2
    assert value["layers"] == [0, 1, 0]


@pytest.mark.parametrize("missing", ["shapes", "layers", "contention", "moves", "dense", "host_s"])
def test_a_part_that_is_missing_is_an_error(missing: str) -> None:
    value = MODEL.as_json()
    del value[missing]
    with pytest.raises(KeyError):
        CostModel.from_json(value)
