"""The scheduler by hand when waves go and lanes die, at any point: everything else goes on and nothing is left."""

from collections.abc import Sequence

import pytest

from fiddler.cost.lanes import Backlog
from fiddler.cost.model import LANES, CostModel, LaneName
from fiddler.scheduler.messages import JobDone
from fiddler.scheduler.plan import Candidate, Plan, all_cpu, all_fetch
from tests.scheduler.desk import BROKEN, Desk, Passed, kinds, resident


def scenario(desk: Desk, n_events: int) -> int:
    """Two waves with hits, fetches, deferral and an empty layer; returns the events it took."""
    loads = [({1: 2, 2: 1, 3: 1}, {4: 1}), ({}, {}), ({0: 1, 1: 1, 5: 3}, {})]
    begun = dict.fromkeys((0, 1), 0)
    for n in range(n_events):
        waiting = [w for w in begun if begun[w] == sum(done.wave == w for done in desk.done) and begun[w] < 3]
        if waiting:
            wave = waiting[0]
            begun[wave] += 1
            desk.ready(wave, begun[wave] - 1, *loads[begun[wave] - 1])
        elif desk.jobs:
            lanes = [lane for lane in LANES if desk.queues[lane]]
            desk.report(desk.queues[lanes[n % len(lanes)]][0])
        else:
            return n
    return n_events


def whole() -> int:
    return scenario(Desk(n_slots=3, planner=all_fetch, promote=True), 1000)


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 1)], ids=str)
def test_a_wave_may_go_at_any_point_and_leaves_nothing(gone: tuple[int, ...]) -> None:
    for n_events in range(whole() + 1):
        waves_go(gone, n_events)


def waves_go(gone: tuple[int, ...], n_events: int) -> None:
    desk = Desk(n_slots=3, planner=all_fetch, promote=True)
    scenario(desk, n_events)
    n_done = len(desk.done)
    for wave in gone:
        desk.drop(wave)
    desk.finish()
    assert all(done.wave not in gone for done in desk.done[n_done:])
    for wave in {0, 1} - set(gone):
        desk.drop(wave)
    desk.assert_nothing_is_left()


@pytest.mark.parametrize("lane", LANES)
def test_a_lane_may_die_at_any_point_and_every_layer_still_passes(lane: LaneName) -> None:
    for n_events in range(whole() + 1):
        lane_dies(lane, n_events)


def lane_dies(lane: LaneName, n_events: int) -> None:
    desk = Desk(n_slots=3, planner=all_fetch, promote=True)
    taken = scenario(desk, n_events)
    desk.die(lane)
    scenario_goes_on(desk)
    assert taken <= n_events
    assert [sum(done.wave == wave for done in desk.done) for wave in (0, 1)] == [3, 3]
    failed = [done for done in desk.done if done.failures or done.late_failures]
    assert lane == "cpu" or not failed
    desk.finish()
    for wave in (0, 1):
        desk.drop(wave)
    desk.assert_nothing_is_left()


def scenario_goes_on(desk: Desk) -> None:
    """Bring both waves to their ends."""
    while True:
        for wave in (0, 1):
            layers = [layer for w, layer in desk.visits if w == wave]
            done = sum(d.wave == wave for d in desk.done)
            if done == len(layers) < 3:
                desk.ready(wave, done, {1: 1, 2: 1})
                break
        else:
            if not desk.jobs:
                return
            desk.report(desk.jobs[0])


def test_loads_in_lanes_run_to_their_end_and_keep_their_slots_until_then() -> None:
    desk = Desk(n_slots=1, planner=all_fetch)
    resident(desk, 0, 1)
    desk.ready(0, 0, {1: 1})
    job = desk.only("gpu")
    desk.drop(0)
    desk.ready(1, 0, {2: 1})
    assert kinds(desk.queues["cpu"]) == [("cpu", [2])]
    desk.report(job)
    desk.finish()
    desk.drop(1)
    desk.assert_nothing_is_left()


def test_an_orphans_failure_is_not_tried_again() -> None:
    desk = Desk(planner=all_fetch)
    resident(desk, 0, 1)
    desk.ready(0, 0, {1: 1})
    desk.drop(0)
    assert desk.fail(desk.only("gpu")) == []
    desk.assert_nothing_is_left()


def test_an_orphans_time_teaches_nothing() -> None:
    desk = Desk()
    for wave in range(40):
        desk.ready(wave, 0, {1: 1})
        desk.drop(wave)
        desk.report(desk.only("cpu"), took_s=0.0)  # its rows were gone: there was nothing to do
    assert desk.core.correction.factors["cpu"] == 1.0
    for wave in range(40, 80):
        desk.ready(wave, 0, {1: 1})
        job = desk.only("cpu")
        desk.report(job, took_s=2 * job.predicted_s)
        desk.drop(wave)
    assert desk.core.correction.factors["cpu"] > 1.5


@pytest.mark.parametrize("lane", ["link", "gpu"])
def test_without_link_or_gpu_nothing_is_copied_any_more(lane: LaneName) -> None:
    desk = Desk(planner=all_fetch, promote=True)
    desk.die(lane)
    desk.ready(0, 0, {1: 1, 2: 1})
    assert kinds(desk.jobs) == [("cpu", [1, 2])]


def test_without_a_link_hits_still_run_from_their_slots() -> None:
    desk = Desk(planner=all_fetch)
    resident(desk, 0, 1)
    desk.die("link")
    desk.ready(0, 0, {1: 1, 2: 1})
    assert kinds(desk.jobs) == [("cpu", [2]), ("gpu", [1])]


def test_without_a_gpu_what_lands_runs_on_the_cpu() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 1})
    desk.die("gpu")
    desk.ready(1, 0, {1: 1})  # it could wait for the copy, and must not
    assert kinds(desk.jobs) == [("cpu", [1]), ("link", [1])]
    desk.report(desk.only("link"))
    assert kinds(desk.jobs) == [("cpu", [1]), ("cpu", [1])]
    desk.finish()
    assert [(done.wave, done.failures) for done in desk.done] == [(1, {}), (0, {})]


def test_without_a_cpu_what_can_be_fetched_is_and_the_rest_fails() -> None:
    desk = Desk(n_slots=2, planner=all_cpu)
    resident(desk, 0, 1)
    desk.die("cpu")
    desk.ready(0, 0, {1: 1, 2: 1, 3: 1})
    assert kinds(desk.jobs) == [("gpu", [1]), ("link", [2])]
    desk.finish()
    assert desk.done == [Passed(0, 0, {3: BROKEN}, {})]


def test_without_a_cpu_a_failed_copy_fails_the_loads_that_waited() -> None:
    desk = Desk(planner=all_fetch)
    desk.die("cpu")
    desk.ready(0, 0, {1: 1}, {1: 1})
    desk.fail(desk.only("link"))
    desk.ready(0, 1, {})
    assert desk.done == [Passed(0, 0, {1: BROKEN}, {}), Passed(0, 1, {}, {1: BROKEN})]


def test_without_any_lane_every_layer_passes_at_once_with_failures() -> None:
    desk = Desk(planner=all_fetch)
    for lane in LANES:
        desk.die(lane)
    desk.ready(0, 0, {1: 1, 2: 1})
    assert desk.done == [Passed(0, 0, {1: BROKEN, 2: BROKEN}, {})]


def test_a_report_from_a_lane_that_was_given_up_is_ignored() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 1})
    copy = desk.only("link")
    desk.die("link")
    assert desk.tell(JobDone(copy.job, 1.0)) == []
    assert desk.die("link") == []
    desk.finish()
    assert desk.done == [Passed(0, 0, {}, {})]


def test_an_event_that_raises_leaves_a_wave_that_can_be_dropped() -> None:
    def broken(
        layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
    ) -> Plan:
        raise BROKEN

    desk = Desk(planner=broken)
    resident(desk, 0, 1)
    with pytest.raises(RuntimeError, match="broken"):
        desk.ready(0, 0, {1: 1, 2: 1})
    desk.drop(0)
    desk.assert_nothing_is_left()


def test_check_finds_a_load_that_is_lost() -> None:
    desk = Desk()
    desk.ready(0, 0, {1: 1})
    layer = desk.wave(0).latest
    assert layer is not None
    layer.ran(layer.work.loads)
    with pytest.raises(AssertionError, match="a load"):
        desk.core.check()


def test_check_finds_a_copy_without_a_slot() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 1})
    copy = desk.core._copies.by_expert[0, 1]
    copy.reservation = copy.reservation._replace(generation=99)
    with pytest.raises(AssertionError, match="no slot"):
        desk.core.check()
