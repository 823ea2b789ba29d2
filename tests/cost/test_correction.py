"""The cost model follows what lanes report, and only what tells of their costs."""

import math

import pytest

from fiddler.cost.model import (
    LANES,
    LIMITS,
    TOLERANCE,
    Contention,
    Correction,
    CostModel,
    Curve,
    ExpertCosts,
    LaneName,
    Moves,
)

SMALL = ExpertCosts(Curve(((1.0, 4e-3), (64.0, 8e-3))), Curve(((1.0, 1e-3),)), 3e-3, 1000)
LARGE = ExpertCosts(Curve(((1.0, 8e-3),)), Curve(((1.0, 2e-3),)), 6e-3, 2000)
COSTS = CostModel((SMALL, LARGE, SMALL), Contention(1.2, 1.3), Moves(1e-4, 1e-6))


def seconds(costs: CostModel, lane: LaneName, layer: int = 0) -> float:
    expert = costs.experts[layer]
    return {"cpu": expert.cpu(1), "gpu": expert.gpu(1), "link": expert.copy_s}[lane]


def follow(correction: Correction, lane: LaneName, slowness: float, n: int = 200) -> None:
    """Report jobs of a lane that takes `slowness` times what was calibrated."""
    for i in range(n):
        layer = i % 3
        correction.report(lane, seconds(correction.costs, lane, layer), slowness * seconds(COSTS, lane, layer))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("slowness", [0.5, 1.0, 1.6, 3.0])
def test_predictions_come_to_what_a_lane_takes(lane: LaneName, slowness: float) -> None:
    correction = Correction(COSTS)
    follow(correction, lane, slowness)
    for layer in range(3):
        predicted = seconds(correction.costs, lane, layer)
        assert predicted == pytest.approx(slowness * seconds(COSTS, lane, layer), rel=TOLERANCE + 0.02)
    assert correction.factors[lane] == pytest.approx(slowness, rel=0.02)


@pytest.mark.parametrize("lane", LANES)
def test_a_lane_is_corrected_alone(lane: LaneName) -> None:
    correction = Correction(COSTS)
    follow(correction, lane, 2.0)
    for other in set(LANES) - {lane}:
        assert seconds(correction.costs, other) == seconds(COSTS, other)
        assert correction.factors[other] == 1.0


def test_what_is_not_a_lanes_own_stays() -> None:
    correction = Correction(COSTS)
    follow(correction, "cpu", 2.0)
    costs = correction.costs
    assert (costs.contention, costs.moves, costs.dense) == (COSTS.contention, COSTS.moves, COSTS.dense)
    assert [e.nbytes for e in costs.experts] == [1000, 2000, 1000]
    assert costs.experts[0] is costs.experts[2]


def test_true_predictions_change_nothing() -> None:
    correction = Correction(COSTS)
    follow(correction, "link", 1.0)
    assert correction.costs is COSTS


def test_one_interrupted_job_changes_little() -> None:
    correction = Correction(COSTS)
    correction.report("cpu", 4e-3, 60.0)
    assert correction.factors["cpu"] <= 1.2 + 1e-9
    follow(correction, "cpu", 1.0)
    assert seconds(correction.costs, "cpu") == pytest.approx(seconds(COSTS, "cpu"), rel=TOLERANCE + 0.02)


def test_factors_stay_within_limits_of_what_was_predicted() -> None:
    correction = Correction(COSTS)
    for _ in range(30):
        correction.report("gpu", 1.0, 0.0)
    assert correction.factors["gpu"] >= LIMITS[0] ** 30
    assert correction.costs.experts[0].gpu(1) > 0.0


@pytest.mark.parametrize("predicted_s", [0.0, -1e-3, math.nan])
def test_a_lane_that_predicts_nothing_is_not_corrected(predicted_s: float) -> None:
    free = Curve(((1.0, 0.0),))
    correction = Correction(CostModel((ExpertCosts(free, free, 0.0, 0),)))
    for lane in LANES:
        for _ in range(20):
            correction.report(lane, predicted_s, 1.0)
    assert correction.factors == dict.fromkeys(LANES, 1.0)


@pytest.mark.parametrize("took_s", [-1.0, math.nan])
def test_impossible_times_are_not_believed(took_s: float) -> None:
    correction = Correction(COSTS)
    correction.report("cpu", 1e-3, took_s)
    assert correction.factors["cpu"] == 1.0


def test_the_factors_given_are_a_copy() -> None:
    correction = Correction(COSTS)
    correction.factors["cpu"] = 9.0
    assert correction.factors["cpu"] == 1.0
