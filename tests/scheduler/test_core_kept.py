"""The scheduler by hand once a copy ahead has landed: its slot is kept until its layer comes, and then let go."""

from collections.abc import Callable

import pytest

from fiddler.cost.model import LaneName
from fiddler.scheduler.plan import all_fetch
from tests.scheduler.desk import Desk, kinds
from tests.scheduler.test_core_ahead import copies


def landed(prefetch: str, **slots: int) -> Desk:
    """A wave in layer 0 with one slot for what it expects in the next, which expert 3 has reached."""
    desk = Desk(prefetch=prefetch, **slots)  # type: ignore[arg-type]
    desk.ready(0, 0, {1: 1, 2: 1}, ahead={3: 1, 4: 1})
    assert copies(desk) == [(1, 3, False)]
    desk.report(desk.only("link"))
    assert desk.cache._slots.leases == {(1, 3): 1}
    return desk


ONE_SLOT = pytest.mark.parametrize(
    ("prefetch", "slots"),
    [("auto", {"n_slots": 1}), ("impact", {"n_slots": 1}), ("eager", {"n_slots": 0, "n_staging": 1})],
)
ENDS: dict[str, Callable[[Desk], object]] = {
    "its layer comes without it": lambda desk: desk.ready(0, 1, {5: 1}),
    "its layer comes and uses it": lambda desk: desk.ready(0, 1, {3: 1}),
    "its layer comes and defers it": lambda desk: desk.ready(0, 1, {5: 1}, late={3: 1}),
    "its wave is dropped": lambda desk: desk.drop(0),
}


@ONE_SLOT
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_has_landed_is_not_evicted_by_the_next_until_its_layer_comes(
    prefetch: str, slots: dict[str, int], end: Callable[[Desk], object]
) -> None:
    desk = landed(prefetch, **slots)
    assert not copies(desk), "4 would have to take its slot"
    desk.ready(1, 0, {2: 1}, ahead={5: 1})
    assert not copies(desk), "so would what another wave expects"
    desk.core.planner = all_fetch
    desk.ready(2, 1, {0: 1})
    assert kinds(desk.queues["cpu"])[-1] == ("cpu", [0]), "nor does a demand"
    assert desk.cache.slot((1, 3)) is not None
    desk.drop(1)
    desk.drop(2)
    desk.finish()
    end(desk)
    desk.finish()
    desk.drop(0)
    assert not desk.cache._slots.leases
    desk.ready(3, 2, {0: 1})
    assert copies(desk) == [(2, 0, True)], "now it gives way"
    assert not desk.cache.holds((1, 3))
    desk.finish()
    desk.drop(3)
    desk.assert_nothing_is_left()


def test_what_two_waves_wait_for_is_kept_until_both_have_come() -> None:
    desk = Desk(prefetch="auto", n_slots=1)
    for wave in (0, 1):
        desk.ready(wave, 0, {1: 1, 2: 1}, ahead={3: 1})
    desk.fail(desk.only("link"))  # so the second wave's copy is made
    assert copies(desk) == [(1, 3, False)]
    desk.report(desk.only("link"))
    assert desk.cache._slots.leases == {(1, 3): 2}
    desk.drop(0)
    assert desk.cache._slots.leases == {(1, 3): 1}
    desk.ready(1, 1, {3: 1})
    desk.finish()
    desk.drop(1)
    desk.assert_nothing_is_left()


@pytest.mark.parametrize("lane", ["link", "gpu", "cpu"])
@pytest.mark.parametrize("comes", [True, False])
def test_it_is_let_go_although_a_lane_has_died(lane: LaneName, comes: bool) -> None:
    desk = landed("auto", n_slots=1)
    desk.die(lane)
    desk.finish()
    if comes:
        desk.ready(0, 1, {3: 1})
        desk.finish()
    desk.drop(0)
    desk.assert_nothing_is_left()


def test_a_copy_that_lands_after_its_layer_has_come_is_kept_by_nobody_else() -> None:
    desk = Desk(prefetch="auto", n_slots=1)
    desk.ready(0, 0, {1: 1, 2: 1}, ahead={3: 1})
    desk.report(desk.only("cpu"))
    desk.ready(0, 1, {5: 1})
    desk.report(desk.only("link"))
    assert desk.cache.slot((1, 3)) is not None
    assert not desk.cache._slots.leases
