"""The scheduler by hand: where each load goes, what waits for what, and what happens when something breaks."""

from collections.abc import Sequence

import pytest

from fiddler.cost.lanes import Backlog
from fiddler.cost.model import CostModel
from fiddler.scheduler.messages import CopyExpert, RunDense, RunExperts
from fiddler.scheduler.plan import Candidate, Plan, all_cpu, all_fetch, assign, best_cut
from tests.scheduler.desk import BROKEN, Desk, Passed, experts, kinds, resident

# Where loads go


def test_misses_run_on_the_cpu_in_one_job() -> None:
    desk = Desk(planner=all_cpu)
    desk.ready(0, 0, {1: 2, 4: 1})
    assert kinds(desk.jobs) == [("cpu", [1, 4])]
    assert desk.report(desk.only("cpu")) == [Passed(0, 0, {}, {})]
    desk.drop(0)
    desk.assert_nothing_is_left()


def test_a_fetch_runs_from_its_slot_once_it_has_landed() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 2, 4: 1})
    assert [(job.urgent, job.expert) for job in desk._copies()] == [(True, 1), (True, 4)]
    (command,) = desk.report(desk._copies()[0])
    assert isinstance(command, RunExperts)
    assert (command.lane, experts(command), command.slots) == ("gpu", [1], (desk.cache.slot((0, 1)),))
    desk.report(desk._copies()[0])
    desk.report(desk.queues["gpu"][0])
    assert not desk.done
    desk.report(desk.queues["gpu"][0])
    assert desk.done == [Passed(0, 0, {}, {})]
    assert desk.core.counters.n_fetches == 2


def test_hits_run_from_their_slots_in_one_job_beside_the_misses() -> None:
    desk = Desk(planner=all_cpu)
    resident(desk, 0, 1, 3)
    desk.ready(0, 0, {1: 1, 2: 5, 3: 1})
    assert kinds(desk.jobs) == [("cpu", [2]), ("gpu", [1, 3])]
    desk.finish()
    assert desk.done == [Passed(0, 0, {}, {})]
    assert desk.core.counters.n_hits == 2


def test_a_copy_under_way_serves_a_second_wave() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 1})
    desk.ready(1, 0, {1: 3})
    assert len(desk.jobs) == 1
    desk.report(desk.only("link"))
    assert [(job.layer.wave.number, experts(job)) for job in desk._on_gpu()] == [(0, [1]), (1, [1])]
    desk.finish()
    assert [done.wave for done in desk.done] == [0, 1]
    assert (desk.core.counters.n_fetches, desk.core.counters.n_hits) == (1, 1)


def test_a_slot_in_use_is_not_taken_by_another_wave() -> None:
    desk = Desk(n_slots=2, planner=all_fetch)
    resident(desk, 0, 1, 3)
    desk.ready(0, 0, {1: 1, 3: 1})
    desk.ready(1, 0, {2: 1, 4: 1})
    assert kinds(desk.jobs) == [("cpu", [2, 4]), ("gpu", [1, 3])]
    desk.finish()
    desk.ready(2, 1, {2: 1, 4: 1})
    assert kinds(desk.jobs) == [("link", [2]), ("link", [4])]


def test_a_layers_fetches_do_not_evict_its_own_hits() -> None:
    desk = Desk(n_slots=2, planner=all_fetch)
    resident(desk, 0, 1, 3)
    desk.ready(0, 0, {1: 1, 2: 1, 3: 1})
    assert kinds(desk.jobs) == [("cpu", [2]), ("gpu", [1, 3])]


def test_a_fetch_that_finds_no_slot_runs_on_the_cpu_and_is_counted_there() -> None:
    def greedy(
        layer: int, candidates: Sequence[Candidate], costs: CostModel, backlog: Backlog, n_fetch: int
    ) -> Plan:
        return assign(layer, [], candidates, costs, backlog)

    desk = Desk(n_slots=1, planner=greedy)
    desk.ready(0, 0, {1: 1, 2: 1, 3: 1})
    assert sorted(kinds(desk.jobs)) == [("cpu", [2, 3]), ("link", [1])]
    counters = desk.core.counters
    assert (counters.n_cpu, counters.n_fetches, counters.n_hits) == (2, 1, 0)
    desk.finish()
    assert len(desk.done) == 1


def test_without_slots_everything_runs_on_the_cpu() -> None:
    desk = Desk(n_slots=0, planner=best_cut, promote=True)
    desk.ready(0, 0, {1: 1, 2: 1})
    assert kinds(desk.jobs) == [("cpu", [1, 2])]


def test_a_layer_that_nobody_visits_is_passed_at_once() -> None:
    desk = Desk()
    assert desk.ready(0, 0, {}) == [Passed(0, 0, {}, {})]
    assert desk.ready(0, 1, {}) == [Passed(0, 1, {}, {})]
    desk.drop(0)
    desk.assert_nothing_is_left()


def test_a_finished_wave_is_gone_only_when_it_says_so() -> None:
    desk = Desk()
    desk.ready(0, 0, {1: 1})
    desk.finish()
    assert not desk.core.idle
    desk.drop(0)
    assert desk.core.idle
    desk.drop(0)  # nor does saying so twice matter
    assert desk.core.idle


# Promotion


def test_a_hot_expert_is_promoted_only_while_the_link_is_idle() -> None:
    desk = Desk(promote=True, policy="aged-lfu")
    desk.ready(0, 0, {1: 5, 2: 1})
    copy = desk.only("link")
    assert isinstance(copy, CopyExpert)
    assert not copy.urgent
    desk.ready(1, 0, {1: 5, 3: 5})
    assert desk.queues["link"] == [copy]
    desk.report(copy)
    desk.ready(2, 0, {1: 5, 3: 5})
    assert experts(desk.only("link")) == [3]
    assert desk.core.counters.n_promotions == 2


def test_nothing_is_promoted_once_the_waves_are_gone() -> None:
    desk = Desk(promote=True, policy="aged-lfu")
    desk.ready(0, 0, {1: 5, 2: 1})
    desk.drop(0)
    desk.report(desk.only("link"))
    assert not desk.queues["link"]
    desk.finish()
    desk.assert_nothing_is_left()


def test_nothing_is_promoted_unless_asked_for() -> None:
    desk = Desk(promote=False)
    desk.ready(0, 0, {1: 5})
    assert kinds(desk.jobs) == [("cpu", [1])]


def test_a_promotion_that_a_layer_comes_to_need_serves_it() -> None:
    desk = Desk(promote=True, n_slots=1, policy="aged-lfu")
    desk.ready(0, 0, {1: 5})
    copy = desk.only("link")
    desk.ready(1, 0, {1: 2})
    desk.report(copy)
    assert kinds(desk.jobs) == [("cpu", [1]), ("gpu", [1])]


def test_a_failed_promotion_concerns_nobody() -> None:
    desk = Desk(promote=True, policy="aged-lfu")
    desk.ready(0, 0, {1: 5})
    desk.fail(desk.only("link"))
    assert desk.core.counters.n_fallbacks == 0
    desk.report(desk.only("cpu"))
    assert desk.done == [Passed(0, 0, {}, {})]


# Failures


def test_a_failed_copy_falls_back_to_the_cpu_for_every_wave_that_waits() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 1})
    desk.ready(1, 0, {1: 3})
    desk.fail(desk.only("link"))
    assert kinds(desk.jobs) == [("cpu", [1]), ("cpu", [1])]
    assert desk.cache.n_free == desk.cache.n_slots
    desk.finish()
    assert desk.done == [Passed(0, 0, {}, {}), Passed(1, 0, {}, {})]
    assert desk.core.counters.n_fallbacks == 2


def test_gpu_loads_that_fail_fall_back_to_the_cpu_and_the_others_count() -> None:
    desk = Desk(planner=all_fetch)
    resident(desk, 0, 1, 3)
    desk.ready(0, 0, {1: 1, 3: 1})
    desk.report(desk.only("gpu"), {3: BROKEN})
    assert kinds(desk.jobs) == [("cpu", [3])]
    desk.finish()
    assert desk.done == [Passed(0, 0, {}, {})]
    assert desk.core.counters.n_fallbacks == 1


def test_what_fails_on_the_cpu_fails_for_good_and_alone() -> None:
    desk = Desk()
    desk.ready(0, 0, {1: 1, 3: 1})
    desk.ready(1, 0, {3: 1})
    first, second = desk.queues["cpu"]
    desk.report(first, {3: BROKEN})
    desk.report(second)
    assert desk.done == [Passed(0, 0, {3: BROKEN}, {}), Passed(1, 0, {}, {})]


def test_what_fell_back_and_fails_again_fails_for_good() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 1, 2: 1})
    desk.fail(desk._copies()[0])
    desk.fail(desk.only("cpu"))
    desk.finish()
    assert desk.done == [Passed(0, 0, {1: BROKEN}, {})]


# Deferral


def test_the_next_layer_waits_for_deferred_loads_and_this_one_does_not() -> None:
    desk = Desk()
    desk.ready(0, 0, {1: 1}, {2: 1})
    now, late = desk.queues["cpu"]
    assert desk.report(now) == [Passed(0, 0, {}, {})]
    desk.ready(0, 1, {3: 1})
    desk.report(desk.queues["cpu"][1])
    assert len(desk.done) == 1
    assert desk.report(late) == [Passed(0, 1, {}, {})]


def test_a_layer_that_nobody_visits_waits_for_deferred_loads_too() -> None:
    desk = Desk()
    desk.ready(0, 0, {}, {2: 1})
    assert [done.layer for done in desk.done] == [0]
    desk.ready(0, 1, {})
    assert [done.layer for done in desk.done] == [0]
    desk.finish()
    assert [done.layer for done in desk.done] == [0, 1]


@pytest.mark.parametrize("early", [False, True], ids=["after the next layer began", "before it began"])
def test_deferred_loads_that_fail_are_told_with_the_next_layer(early: bool) -> None:
    desk = Desk()
    desk.ready(0, 0, {1: 1}, {2: 1})
    now, late = desk.queues["cpu"]
    desk.report(now)
    if early:
        desk.fail(late)
    desk.ready(0, 1, {3: 1})
    if not early:
        desk.fail(late)
    desk.finish()
    assert desk.done == [Passed(0, 0, {}, {}), Passed(0, 1, {}, {2: BROKEN})]
    desk.ready(0, 2, {})
    assert desk.done[-1] == Passed(0, 2, {}, {})


@pytest.mark.parametrize("which", ["now", "late"])
def test_an_experts_immediate_and_deferred_rows_fail_apart(which: str) -> None:
    desk = Desk()
    desk.ready(0, 0, {1: 1}, {1: 2})
    now, late = desk.queues["cpu"]
    (desk.fail if which == "now" else desk.report)(now)
    (desk.fail if which == "late" else desk.report)(late)
    desk.ready(0, 1, {})
    expected = {1: BROKEN}
    assert desk.done[0].failures == (expected if which == "now" else {})
    assert desk.done[1].late_failures == (expected if which == "late" else {})


def test_a_late_failure_does_not_change_what_was_told() -> None:
    desk = Desk()
    desk.ready(0, 0, {1: 1}, {2: 1})
    now, late = desk.queues["cpu"]
    desk.report(now)
    desk.fail(late)
    assert desk.done == [Passed(0, 0, {}, {})]


def test_immediate_and_deferred_rows_of_one_expert_share_a_fetch() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 1}, {1: 2})
    desk.report(desk.only("link"))
    assert kinds(desk.jobs) == [("gpu", [1]), ("gpu", [1])]
    desk.finish()
    assert len(desk.done) == 1
    assert desk.cache.history.n_rows((0, 1)) == 3


# The dense part


def test_the_dense_part_takes_its_time_on_the_gpu() -> None:
    desk = Desk()
    (layer,) = desk.dense_queued(0)
    (head,) = desk.dense_queued(1, head=True)
    assert isinstance(layer, RunDense)
    assert isinstance(head, RunDense)
    assert (layer.predicted_s, head.predicted_s) == (2e-3, 1e-3)
    assert desk.report(layer) == [Passed(0, None)]
    assert desk.report(head) == [Passed(1, None)]


def test_a_dense_part_goes_on_without_a_gpu() -> None:
    desk = Desk()
    desk.dense_queued(0)
    assert desk.die("gpu") == [Passed(0, None)]
    assert desk.dense_queued(0) == [Passed(0, None)]


# Numbers


def test_the_backlog_is_what_the_lanes_have_to_do() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 0, {1: 1, 2: 1})
    assert desk.core.backlog().link_s == pytest.approx(6e-3)
    desk.report(desk._copies()[0])
    assert desk.core.backlog().link_s == pytest.approx(3e-3)
    assert desk.core.backlog().gpu_s == pytest.approx(1e-3)


def test_a_layers_predicted_time_is_compared_with_what_it_took() -> None:
    desk = Desk()
    desk.ready(0, 0, {1: 1})
    job = desk.only("cpu")
    desk.now_s += job.predicted_s - 1e-3  # the event itself takes a millisecond
    desk.report(job)
    assert desk.core.counters.n_layers == 1
    assert desk.core.counters.median_error() == pytest.approx(0.0, abs=1e-9)


def test_copies_say_what_they_copy() -> None:
    desk = Desk(planner=all_fetch)
    desk.ready(0, 2, {4: 1})
    copy = desk.only("link")
    assert isinstance(copy, CopyExpert)
    assert (copy.layer, copy.expert, copy.predicted_s) == (2, 4, 3e-3)
