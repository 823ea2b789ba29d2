"""A GPU that keeps its order: experts are given to it before copies land, and are done before they have run."""

from fiddler.scheduler.messages import CopyExpert, JobTook, LayerTook, RunExperts
from fiddler.scheduler.plan import all_fetch
from tests.scheduler.desk import Desk, Passed, kinds


def fetching(n_slots: int = 4) -> tuple[Desk, CopyExpert]:
    """A wave whose one expert is on its way in."""
    desk = Desk(n_slots=n_slots, planner=all_fetch)
    desk.ready(0, 0, {3: 1})
    copy = desk.only("link")
    assert isinstance(copy, CopyExpert)
    return desk, copy


def on_gpu(desk: Desk) -> RunExperts:
    job = desk.only("gpu")
    assert isinstance(job, RunExperts)
    return job


def test_a_load_does_not_wait_for_its_copy_to_land() -> None:
    desk, copy = fetching()
    assert not desk.queues["gpu"]
    assert kinds(desk.order(copy)) == [("gpu", [3])]  # type: ignore[arg-type]
    assert on_gpu(desk).slots == (copy.slot,)
    assert desk.cache.slot((0, 3)) is None
    (done,) = desk.queue(on_gpu(desk))
    assert isinstance(done, Passed)
    desk.report(copy)
    assert desk.cache.slot((0, 3)) == copy.slot


def test_another_wave_s_load_goes_to_a_copy_that_is_ordered_at_once() -> None:
    desk, copy = fetching()
    desk.order(copy)
    desk.queue(on_gpu(desk))
    assert ("gpu", [3]) in kinds(desk.ready(1, 0, {3: 2}))  # type: ignore[arg-type]


def test_an_order_for_a_copy_that_has_landed_says_nothing() -> None:
    desk, copy = fetching()
    desk.report(copy)
    desk.ordered.clear()
    assert desk.order(copy) == []


def test_a_slot_in_passing_is_judged_when_who_used_it_held_no_lease() -> None:
    desk = Desk(n_slots=1, n_staging=1, planner=all_fetch, policy="aged-lfu")
    for wave in range(3):  # one expert is worth its slot
        desk.ready(wave, 0, {0: 3})
        desk.finish()
        desk.drop(wave)
    desk.ready(9, 1, {5: 1})
    copy = desk.only("link")
    assert isinstance(copy, CopyExpert)
    desk.order(copy)
    desk.queue(on_gpu(desk))
    desk.report(copy)
    assert desk.cache.slot((0, 0)) is not None
    desk.drop(9)
    desk.finish()
    desk.assert_nothing_is_left()


def test_what_a_layer_took_is_told_later() -> None:
    desk, copy = fetching()
    desk.order(copy)
    desk.queue(on_gpu(desk))
    layer = desk.wave(0).latest
    assert layer is not None
    assert desk.core.counters.median_error() == 0.0
    desk.tell(LayerTook(layer, 1.0))
    assert desk.core.counters.median_error() > 0.5
    error = desk.core.counters.median_error()
    desk.tell(LayerTook(layer, 5.0))
    assert desk.core.counters.median_error() == error, "it was known"


def test_what_a_job_took_corrects_what_is_predicted() -> None:
    desk, _ = fetching()
    before = desk.core.correction.costs.gpu_s(0, [1])
    for _ in range(50):
        desk.tell(JobTook("gpu", before, 3 * before))
    assert desk.core.correction.costs.gpu_s(0, [1]) > 1.5 * before


def test_the_link_s_death_takes_nothing_from_who_was_given_to_the_gpu() -> None:
    desk, copy = fetching()
    desk.order(copy)
    desk.die("link")
    (done,) = desk.queue(on_gpu(desk))
    assert isinstance(done, Passed)
    assert not done.failures
