"""The scheduler by hand where it copies ahead: what goes first, what is waited for, and when it is left alone."""

import pytest

from fiddler.cost.model import LaneName
from fiddler.scheduler.guesses import saved_s
from fiddler.scheduler.plan import all_cpu, all_fetch
from fiddler.scheduler.prefetch import Prefetcher
from tests.scheduler.desk import COSTS, Desk, experts, kinds, resident

LINK, K = COSTS.experts[0].copy_s, COSTS.contention
STEP_S = 1e-3
"""What `Desk` lets pass between events."""


def made(desk: Desk) -> Prefetcher:
    return desk.core.prefetcher


def copies(desk: Desk) -> list[tuple[int, int, bool]]:
    """Layer, expert and urgency of what is in the link."""
    return [(job.layer, job.expert, job.urgent) for job in desk._copies()]


def mirrored(desk: Desk) -> list[int]:
    """The experts in the link, in the order in which the scheduler holds them to run."""
    jobs = {job.job: job for job in desk._copies()}
    return [jobs[queued.job].expert for queued in desk.core._jobs.lanes.queues["link"]]


def test_an_expert_is_copied_ahead_beside_the_cpus_work_and_runs_from_its_slot() -> None:
    desk = Desk(prefetch="auto")
    desk.ready(0, 0, {1: 1, 2: 1}, ahead={3: 1})
    assert kinds(desk.jobs) == [("cpu", [1, 2]), ("link", [3])]
    assert copies(desk) == [(1, 3, False)]
    desk.report(desk.only("link"))
    desk.report(desk.only("cpu"))
    desk.ready(0, 1, {3: 1})
    assert kinds(desk.jobs) == [("gpu", [3])]
    use = made(desk).use
    assert (use.n_issued, use.n_settled, use.n_landed, use.n_used, use.n_true) == (1, 1, 1, 1, 1)
    desk.finish()
    desk.drop(0)
    desk.assert_nothing_is_left()


def test_one_is_copied_after_the_other_while_there_is_time() -> None:
    desk = Desk(prefetch="auto")
    desk.ready(0, 0, {1: 1, 2: 1}, ahead={3: 1, 4: 1, 5: 1})
    for expert in (3, 4):
        assert experts(desk.only("link")) == [expert]
        desk.now_s += LINK * K.link
        desk.report(desk.only("link"))
    assert not desk.queues["link"], "the CPU will be done before a third has landed"


def test_a_layer_without_work_for_the_cpu_leaves_no_time() -> None:
    desk = Desk(prefetch="auto")
    resident(desk, 0, 1)
    desk.ready(0, 0, {1: 1}, ahead={3: 1})
    assert kinds(desk.jobs) == [("gpu", [1])]


def test_fetches_come_first_and_what_is_ahead_waits_until_the_link_is_idle() -> None:
    desk = Desk(prefetch="eager", n_staging=2, planner=all_fetch)
    desk.ready(0, 0, {1: 1, 2: 1}, ahead={3: 1})
    assert copies(desk) == [(0, 1, True), (0, 2, True)]
    desk.report(desk.queues["link"][0])
    assert copies(desk) == [(0, 2, True)]
    desk.report(desk.only("link"))
    assert copies(desk) == [(1, 3, False)]


def test_an_expert_that_is_on_its_way_when_its_layer_comes_is_waited_for() -> None:
    desk = Desk(prefetch="eager", n_staging=2, planner=all_fetch)
    desk.ready(0, 0, {}, ahead={3: 1})
    copy = desk.only("link")
    desk.ready(0, 1, {3: 1})
    assert desk.jobs == [copy], "no second copy"
    desk.report(copy)
    assert kinds(desk.jobs) == [("gpu", [3])]
    use = made(desk).use
    assert (use.n_landed, use.n_used, use.delay_s) == (0, 1, 0.0)
    assert (desk.core.counters.n_hits, desk.core.counters.n_fetches) == (1, 0)


def test_a_demand_waits_for_what_was_started_ahead_and_that_is_counted_once() -> None:
    desk = Desk(prefetch="eager", n_staging=2, planner=all_fetch)
    desk.ready(0, 0, {}, ahead={3: 1})
    desk.ready(1, 0, {4: 1, 5: 1})
    assert mirrored(desk) == [3, 4, 5], "what has started is not overtaken"
    left_s = LINK - STEP_S
    assert made(desk).use.delay_s == pytest.approx(left_s)
    assert desk.core.backlog().link_s == pytest.approx(left_s + 2 * LINK)
    desk.ready(2, 0, {1: 1})
    assert made(desk).use.delay_s == pytest.approx(left_s), "the fourth waits for the second and third"


def test_nothing_is_counted_where_a_demand_waits_for_a_demand_or_a_promotion() -> None:
    desk = Desk(prefetch="eager", n_staging=2, planner=all_fetch)
    desk.ready(0, 0, {1: 1})
    desk.ready(1, 0, {2: 1})
    assert len(desk.jobs) == 2
    assert made(desk).use.delay_s == 0.0


def test_a_demand_overtakes_what_is_queued_ahead_and_has_not_started() -> None:
    """The scheduler itself queues nothing ahead behind another copy; a lane would keep the order all the same."""
    desk = Desk(prefetch="eager", n_staging=2, planner=all_fetch)
    desk.ready(0, 0, {}, ahead={3: 1})
    reservation = desk.cache.reserve((2, 5))
    assert reservation is not None
    desk.queues["link"].append(desk.core._copies.start(reservation, "ahead"))
    desk.ready(1, 0, {4: 1})
    assert mirrored(desk) == [3, 4, 5]


def test_what_was_expected_of_a_wave_that_is_dropped_is_not_copied() -> None:
    def after(*, dropped: bool) -> list[tuple[int, int, bool]]:
        desk = Desk(prefetch="eager", n_staging=2, planner=all_fetch)
        desk.ready(0, 0, {1: 1}, ahead={3: 1})
        if dropped:
            desk.drop(0)
        desk.report(desk.only("link"))
        return copies(desk)

    assert after(dropped=False) == [(1, 3, False)]
    assert after(dropped=True) == []


@pytest.mark.parametrize("lane", ["link", "gpu", "cpu"])
@pytest.mark.parametrize("early", [True, False])
def test_nothing_is_copied_ahead_without_a_lane(lane: LaneName, early: bool) -> None:
    desk = Desk(prefetch="eager", n_staging=2, planner=all_cpu)
    if early:
        desk.die(lane)
    desk.ready(0, 0, {1: 1}, ahead={3: 1, 4: 1})
    if not early:
        assert copies(desk) == [(1, 3, False)]
        desk.die(lane)
    desk.finish()
    assert made(desk).use.n_issued == (not early)
    assert len(desk.done) == 1


def test_without_slots_nothing_is_copied_ahead() -> None:
    desk = Desk(prefetch="eager", n_slots=0)
    desk.ready(0, 0, {1: 1}, ahead={3: 1})
    assert kinds(desk.jobs) == [("cpu", [1])]


def test_an_expert_that_is_worth_too_little_to_stay_passes_through() -> None:
    desk = Desk(prefetch="eager", policy="static", n_slots=1, n_staging=1)
    resident(desk, 0, 0)
    desk.ready(0, 0, {}, ahead={3: 1})
    desk.report(desk.only("link"))
    assert desk.cache.slot((1, 3)) is not None
    desk.ready(0, 1, {3: 1})
    assert kinds(desk.jobs) == [("gpu", [3])]
    desk.finish()
    assert not desk.cache.holds((1, 3))
    assert desk.cache.slot((0, 0)) is not None


def test_a_copy_ahead_that_fails_concerns_nobody_and_is_not_tried_again() -> None:
    desk = Desk(prefetch="eager", n_staging=2, planner=all_fetch)
    desk.ready(0, 0, {}, ahead={3: 1})
    desk.fail(desk.only("link"))
    assert not desk.jobs
    assert desk.core.counters.n_fallbacks == 0
    desk.ready(0, 1, {3: 1})
    assert copies(desk) == [(1, 3, True)]
    use = made(desk).use
    assert (use.n_settled, use.n_landed, use.n_used, use.gained_s) == (1, 0, 1, 0.0)


def test_transitions_copy_ahead_what_a_wave_before_went_on_to() -> None:
    desk = Desk(prefetch="transitions")
    desk.ready(0, 0, {1: 1, 2: 1})
    desk.report(desk.only("cpu"))
    desk.ready(0, 1, {4: 1})
    desk.finish()
    desk.drop(0)
    assert not desk.queues["link"]
    desk.ready(1, 0, {1: 1, 2: 1})
    assert copies(desk) == [(1, 4, False)]


def test_a_deferred_visit_is_one_that_came_true() -> None:
    desk = Desk(prefetch="auto", n_slots=1)
    desk.ready(0, 0, {1: 1, 2: 1}, ahead={3: 1})
    desk.report(desk.only("link"))
    desk.report(desk.only("cpu"))
    desk.ready(0, 1, {5: 1}, late={3: 2})
    use = made(desk).use
    assert (use.n_settled, use.n_landed, use.n_used, use.n_true) == (1, 1, 1, 1)
    assert use.gained_s == saved_s(COSTS, 1, 2)


def test_where_one_waves_guess_finds_no_slot_anothers_is_copied() -> None:
    desk = Desk(n_slots=3, policy="layer-lru", prefetch="impact")
    resident(desk, 1, 0)
    desk.ready(0, 1, {0: 1})
    desk.ready(1, 0, {1: 1}, ahead={3: 1})
    assert not copies(desk), "the slot of layer 1 is in use"
    desk.ready(2, 1, {0: 1}, ahead={5: 1})
    assert copies(desk) == [(2, 5, False)]


def test_eager_guesses_take_no_slot_from_those_that_are_kept_until_they_are_used() -> None:
    desk = Desk(prefetch="eager", n_slots=2, n_staging=1)
    resident(desk, 0, 0, 1)
    desk.ready(0, 0, {}, ahead={3: 1, 4: 1})
    desk.report(desk.only("link"))
    assert not copies(desk), "there is one slot for guesses"
    assert all(desk.cache.slot(key) is not None for key in ((0, 0), (0, 1), (1, 3)))
    desk.ready(0, 1, {3: 1})
    desk.finish()
    assert desk.cache.slot((1, 3)) is not None
    assert (desk.cache.slot((0, 0)) is None) is not (desk.cache.slot((0, 1)) is None), "one gave way to it"
    assert desk.cache.n_ready == 2


def test_without_slots_in_passing_nothing_is_copied_eagerly() -> None:
    desk = Desk(prefetch="eager")
    desk.ready(0, 0, {}, ahead={3: 1})
    assert not copies(desk)
