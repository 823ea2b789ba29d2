"""Lanes as queues of seconds: order, contention, and the two ways to let time pass."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cost.lanes import Lanes, Queued
from fiddler.cost.model import LANES, Contention, LaneName

jobs = st.lists(st.tuples(st.sampled_from(LANES), st.floats(0.001, 10.0)), min_size=1, max_size=12)
contentions = st.builds(Contention, st.floats(1.0, 2.0), st.floats(1.0, 2.0))


def run(lanes: Lanes) -> dict[int, float]:
    """Run everything; return when each job was done."""
    now = 0.0
    ends: dict[int, float] = {}
    while (step := lanes.next_s()) is not None:
        now += step
        ends |= {job: now for _, job in lanes.advance(step)}
    return ends


def filled(queued: list[tuple[LaneName, float]], contention: Contention) -> Lanes:
    lanes = Lanes(contention)
    for job, (lane, seconds) in enumerate(queued):
        lanes.put(lane, job, seconds)
    return lanes


def order(lanes: Lanes, lane: LaneName) -> list[int]:
    return [queued.job for queued in lanes.queues[lane]]


def queued_s(lane: Iterable[Queued]) -> float:
    """Seconds of work in a lane, as it takes alone."""
    return sum(queued.left_s for queued in lane)


def test_a_lane_runs_one_job_after_the_other_and_lanes_run_side_by_side() -> None:
    lanes = filled([("cpu", 1.0), ("cpu", 2.0), ("gpu", 2.5)], Contention())
    assert run(lanes) == {0: 1.0, 1: 3.0, 2: 2.5}


def test_cpu_and_link_slow_each_other_while_both_are_busy() -> None:
    lanes = filled([("cpu", 4.0), ("link", 1.0), ("gpu", 3.0)], Contention(cpu=1.5, link=2.0))
    ends = run(lanes)
    assert ends[1] == 2.0, "the whole copy is slowed"
    assert ends[0] == pytest.approx(2.0 + 4.0 - 2.0 / 1.5), "the CPU only until the copy has landed"
    assert ends[2] == 3.0, "the GPU reads its own memory"


@given(jobs, contentions)
def test_contention_ends_when_the_shorter_lane_is_done(
    queued: list[tuple[LaneName, float]], contention: Contention
) -> None:
    work = {lane: sum(s for other, s in queued if other == lane) for lane in LANES}
    both = min(work["cpu"] * contention.cpu, work["link"] * contention.link)
    factors = {"cpu": contention.cpu, "gpu": 1.0, "link": contention.link}
    ends = run(filled(queued, contention))
    for lane in LANES:
        last = max((end for job, end in ends.items() if queued[job][0] == lane), default=0.0)
        shared = min(work[lane], both / factors[lane])
        assert last == pytest.approx(work[lane] + shared * (factors[lane] - 1.0))


def test_an_urgent_job_goes_before_those_that_are_not_but_not_before_a_started_one() -> None:
    lanes = Lanes()
    for job, urgent in enumerate((False, False, True, True, False)):
        lanes.put("link", job, 1.0, urgent=urgent)
    assert order(lanes, "link") == [0, 2, 3, 1, 4]


def test_demand_waits_for_demand_and_for_what_has_started() -> None:
    lanes = Lanes()
    lanes.put("link", 0, 4.0, urgent=False)
    lanes.put("link", 1, 2.0, urgent=False)
    lanes.put("link", 2, 1.0)
    assert lanes.backlog().link_s == 5.0
    assert queued_s(lanes.link) == 7.0


def test_ahead_counts_what_is_queued_before_and_the_copy_itself() -> None:
    lanes = filled([("link", 4.0), ("link", 2.0), ("cpu", 9.0)], Contention(link=2.0))
    assert lanes.ahead_s(0) == 4.0
    assert lanes.ahead_s(1) == 6.0
    assert lanes.ahead_s(7) == 0.0
    lanes.advance(2.0)
    assert lanes.ahead_s(1) == 5.0, "of work, of which contention does half a second in one"


def test_a_removed_job_leaves_its_place_to_the_next() -> None:
    lanes = Lanes()
    for job in range(3):
        lanes.put("link", job, 1.0, urgent=False)
    lanes.remove("link", 0)
    lanes.remove("link", 9)
    lanes.put("link", 3, 1.0)
    assert order(lanes, "link") == [1, 3, 2], "the new head has started"


def test_advance_takes_out_what_is_done_and_pass_by_leaves_it() -> None:
    advanced, passed = filled([("cpu", 1.0)], Contention()), filled([("cpu", 1.0)], Contention())
    assert advanced.advance(1.0) == [("cpu", 0)]
    passed.pass_by(5.0)
    assert advanced.next_s() is None
    assert order(passed, "cpu") == [0]
    assert queued_s(passed.cpu) == 0.0


def test_a_late_job_holds_up_its_lane_and_is_not_held_to_contend_any_more() -> None:
    lanes = filled([("link", 1.0), ("link", 1.0), ("cpu", 4.0)], Contention(cpu=2.0))
    lanes.pass_by(3.0)
    assert queued_s(lanes.link) == 1.0, "the second copy waits for word of the first"
    assert queued_s(lanes.cpu) == 1.5
    lanes.remove("link", 0)
    lanes.pass_by(1.0)
    assert queued_s(lanes.link) == 0.0


@given(jobs, contentions, st.floats(0.0, 30.0))
def test_time_passes_by_in_any_number_of_steps(
    queued: list[tuple[LaneName, float]], contention: Contention, seconds: float
) -> None:
    once, often = filled(queued, contention), filled(queued, contention)
    once.pass_by(seconds)
    for _ in range(7):
        often.pass_by(seconds / 7)
    for lane in LANES:
        assert queued_s(often.queues[lane]) == pytest.approx(queued_s(once.queues[lane]), abs=1e-9)


@given(jobs, contentions)
def test_both_ways_agree_until_the_first_job_is_done(
    queued: list[tuple[LaneName, float]], contention: Contention
) -> None:
    advanced, passed = filled(queued, contention), filled(queued, contention)
    step = advanced.next_s()
    assert step is not None
    advanced.advance(step)
    passed.pass_by(step)
    for lane in LANES:
        assert queued_s(passed.queues[lane]) == pytest.approx(queued_s(advanced.queues[lane]), abs=1e-9)


# One thread that drives all of them


def alone(queued: list[tuple[LaneName, float]], contention: Contention) -> Lanes:
    lanes = filled(queued, contention)
    lanes.overlap = False
    return lanes


def test_without_overlap_the_cpu_waits_while_the_link_or_the_gpu_works() -> None:
    lanes = alone([("cpu", 1.0), ("link", 2.0), ("gpu", 3.0)], Contention(2.0, 2.0))
    assert lanes.working() == {"gpu": 1.0, "link": 1.0}
    assert run(lanes) == {1: 2.0, 2: 3.0, 0: 4.0}, "and nobody slows anybody"


def test_a_cpu_job_is_interrupted_by_what_comes_to_the_gpu() -> None:
    lanes = alone([("cpu", 2.0)], Contention())
    lanes.advance(0.5)
    lanes.put("gpu", 1, 4.0)
    assert run(lanes) == {1: 4.0, 0: 5.5}, "half a second of it was done"


@given(jobs, contentions)
def test_without_overlap_the_cpu_adds_to_what_the_others_take(
    queued: list[tuple[LaneName, float]], contention: Contention
) -> None:
    work = {lane: sum(s for other, s in queued if other == lane) for lane in LANES}
    ends = run(alone(queued, contention))
    assert max(ends.values()) == pytest.approx(max(work["gpu"], work["link"]) + work["cpu"])
    last = max((end for job, end in ends.items() if queued[job][0] != "cpu"), default=0.0)
    assert last == pytest.approx(max(work["gpu"], work["link"])), "they do not notice the CPU"
