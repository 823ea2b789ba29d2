"""What every set of lanes promises, kept by all three of them."""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from threading import Event, current_thread
from threading import enumerate as threads
from typing import Any

import pytest

from fiddler.cost.model import LANES, Contention, CostModel, Curve, ExpertCosts, LaneName
from fiddler.lanes.laneset import Execute, InlineLanes, LaneSet
from fiddler.lanes.threads import ThreadLanes
from fiddler.lanes.virtual import VirtualLanes
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.messages import CopyExpert, Failures, Job, JobDone, LaneDied, Report, RunDense, RunExperts
from fiddler.scheduler.routing import LayerWork, Load
from fiddler.trace import Trace
from tests.support.patience import WAIT_S, patience

CPU_S, GPU_S, COPY_S = 4.0, 1.0, 3.0
COSTS = CostModel(
    (ExpertCosts(Curve(((1.0, CPU_S),)), Curve(((1.0, GPU_S),)), COPY_S, 1000),), Contention(1.25, 1.5)
)
BROKEN = RuntimeError("broken")
Make = Callable[[Execute], LaneSet]


def virtual(execute: Execute) -> LaneSet:
    return VirtualLanes(COSTS, execute)


@pytest.fixture(params=[InlineLanes, ThreadLanes, virtual], ids=["inline", "threads", "virtual"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


@contextmanager
def opened(lanes: LaneSet) -> Generator[LaneSet]:
    """Close whatever happens, and wait for nothing for ever."""
    with patience():
        try:
            yield lanes
        finally:
            lanes.close()


def on(lane: LaneName, number: int, n_loads: int = 1) -> RunExperts:
    loads = tuple(Load(expert, expert, expert + 1) for expert in range(n_loads))
    slots = tuple(range(n_loads)) if lane == "gpu" else ()
    return RunExperts(number, lane, Layer(Wave(), LayerWork(0, loads, ()), 1, 1), loads, slots, 0.0)


def copy(number: int, *, urgent: bool = True) -> CopyExpert:
    return CopyExpert(number, 0, number, 0, "demand" if urgent else "promotion", 0.0)


def nothing(job: Job) -> Failures:
    return {}


def reports(lanes: LaneSet, n: int) -> list[Report]:
    return [lanes.report() for _ in range(n)]


def numbers(reports: Iterable[Report]) -> list[int]:
    return [report.job for report in reports if isinstance(report, JobDone)]


class Noted:
    """Notes the jobs that were run, in order."""

    def __init__(self) -> None:
        self.jobs: list[int] = []

    def __call__(self, job: Job) -> Failures:
        self.jobs.append(job.job)
        return {}


def test_each_job_is_reported_once(make: Make) -> None:
    with opened(make(nothing)) as lanes:
        for number in range(60):
            lanes.start(copy(number) if number % 3 == 0 else on(("cpu", "gpu")[number % 2], number))
        assert sorted(numbers(reports(lanes, 60))) == list(range(60))
        assert lanes.drain() == []


def test_a_lane_runs_its_jobs_in_the_order_they_were_started(make: Make) -> None:
    noted: dict[LaneName, list[int]] = {lane: [] for lane in LANES}

    def execute(job: Job) -> Failures:
        noted[job.lane].append(job.job)
        return {}

    with opened(make(execute)) as lanes:
        for number in range(30):
            lanes.start(copy(number) if number % 3 == 0 else on(("cpu", "gpu")[number % 2], number))
        done = numbers(reports(lanes, 30))
    for ran in noted.values():
        assert ran == sorted(ran)
        assert [number for number in done if number in ran] == ran
    assert sum(map(len, noted.values())) == 30


def test_what_failed_is_in_the_report(make: Make) -> None:
    with opened(make(lambda job: {7: BROKEN} if job.job else {})) as lanes:
        lanes.start(on("cpu", 0))
        lanes.start(on("cpu", 1))
        first, second = reports(lanes, 2)
    assert isinstance(first, JobDone)
    assert isinstance(second, JobDone)
    assert (first.failures, second.failures) == ({}, {7: BROKEN})
    assert first.took_s >= 0.0


def test_jobs_may_be_started_between_reports(make: Make) -> None:
    with opened(make(nothing)) as lanes:
        for number in range(20):
            lanes.start(on(("cpu", "gpu")[number % 2], number))
            assert numbers(reports(lanes, 1)) == [number]


def test_the_clock_never_goes_back(make: Make) -> None:
    with opened(make(nothing)) as lanes:
        seen = [lanes.now_s()]
        for number in range(5):
            lanes.start(on("cpu", number))
            lanes.report()
            seen.append(lanes.now_s())
    assert seen == sorted(seen)


def test_a_job_that_raises_ends_its_lane_and_no_other(make: Make) -> None:
    def execute(job: Job) -> Failures:
        if job.job == 1:
            raise BROKEN
        return {}

    with opened(make(execute)) as lanes:
        for number in range(3):
            lanes.start(on("cpu", number))
        first, second = reports(lanes, 2)
        assert isinstance(first, JobDone)
        assert (first.job, second) == (0, LaneDied("cpu", BROKEN))
        lanes.start(on("cpu", 3))  # asked for before the death was known; nobody may wait for it
        lanes.start(on("gpu", 4))
        lanes.start(copy(5))
        assert sorted(numbers(reports(lanes, 2))) == [4, 5]
        assert lanes.drain() == []


def test_jobs_show_in_the_trace() -> None:
    trace = Trace()
    kinds: list[LaneSet] = [
        InlineLanes(nothing, trace),
        ThreadLanes(nothing, trace=trace),
        VirtualLanes(COSTS, trace=trace),
    ]
    for made in kinds:
        with opened(made) as lanes:
            for job in (on("cpu", 0, 2), on("gpu", 1), copy(2, urgent=False), copy(3), RunDense(4, Wave(), 1.0)):
                lanes.start(job)
            reports(lanes, 5)
        names = sorted(span.name for span in trace.spans)
        assert names == ["L0 1 expert", "L0 2 experts", "copy L0 E3", "dense", "promote L0 E2"]
        assert all(span.start_s <= span.end_s for span in trace.spans)
        trace.spans.clear()


# Lanes in the engine's own thread


def test_inline_jobs_run_when_they_are_started() -> None:
    noted = Noted()
    lanes = InlineLanes(noted)
    for number in range(3):
        lanes.start(on("cpu", number))
    assert noted.jobs == [0, 1, 2]
    assert numbers(lanes.drain()) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="no job is in flight"):
        lanes.report()


# Worker threads


def workers() -> list[str]:
    return sorted(thread.name for thread in threads() if thread.name in {f"fiddler-{lane}" for lane in LANES})


def test_each_lane_has_a_thread_of_its_own_until_it_is_closed() -> None:
    seen: dict[LaneName, str] = {}

    def execute(job: Job) -> Failures:
        seen[job.lane] = current_thread().name
        return {}

    before = workers()
    with opened(ThreadLanes(execute)) as lanes:
        for job in (on("cpu", 0), on("gpu", 1), copy(2)):
            lanes.start(job)
        reports(lanes, 3)
    assert seen == {lane: f"fiddler-{lane}" for lane in LANES}
    assert workers() == before


def test_lanes_run_side_by_side() -> None:
    """Each job waits until the other has begun: in one thread they would wait for ever."""
    begun: dict[LaneName, Event] = {"cpu": Event(), "gpu": Event()}

    def execute(job: Job) -> Failures:
        begun[job.lane].set()
        assert begun["gpu" if job.lane == "cpu" else "cpu"].wait(WAIT_S)
        return {}

    with opened(ThreadLanes(execute)) as lanes:
        lanes.start(on("cpu", 0))
        lanes.start(on("gpu", 1))
        assert sorted(numbers(reports(lanes, 2))) == [0, 1]


def test_urgent_copies_overtake_those_that_nobody_waits_for_but_not_a_started_one() -> None:
    noted, begun, go = Noted(), Event(), Event()

    def execute(job: Job) -> Failures:
        begun.set()
        assert go.wait(WAIT_S)
        return noted(job)

    with opened(ThreadLanes(execute)) as lanes:
        lanes.start(copy(0, urgent=False))
        assert begun.wait(WAIT_S)
        for job in (copy(1, urgent=False), copy(2, urgent=False), copy(3), copy(4)):
            lanes.start(job)
        go.set()
        reports(lanes, 5)
    assert noted.jobs == [0, 3, 4, 1, 2]


def test_closing_waits_for_what_is_queued() -> None:
    noted = Noted()
    with opened(ThreadLanes(noted)) as lanes:
        for number in range(20):
            lanes.start(copy(number, urgent=number % 2 == 0))
    assert sorted(noted.jobs) == list(range(20))
    assert sorted(numbers(lanes.drain())) == list(range(20))


def test_closing_after_a_workers_death_waits_for_nobody() -> None:
    def execute(job: Job) -> Failures:
        raise BROKEN

    with opened(ThreadLanes(execute)) as lanes:
        for lane in LANES:
            lanes.start(copy(0) if lane == "link" else on(lane, 1))
        died = reports(lanes, 3)
    assert {report.lane for report in died if isinstance(report, LaneDied)} == set(LANES)
    assert workers() == []


def test_reports_wait_while_the_engines_thread_is_busy_and_come_in_order() -> None:
    done = Event()

    def execute(job: Job) -> Failures:
        if job.job == 99:
            done.set()
        return {}

    with opened(ThreadLanes(execute)) as lanes:
        for number in range(100):
            lanes.start(on("cpu", number))
        assert done.wait(WAIT_S)
        assert numbers(reports(lanes, 100)) == list(range(100))


@pytest.mark.parametrize("where", ["entering", "leaving early"])
def test_a_worker_that_cannot_work_is_reported(where: str) -> None:
    class End(BaseException):
        pass

    @contextmanager
    def broken() -> Any:
        if where == "entering" and current_thread().name == "fiddler-gpu":
            raise BROKEN
        yield

    def execute(job: Job) -> Failures:
        if where != "entering" and job.lane == "gpu":
            raise End
        return {}

    working: Callable[[], AbstractContextManager[None]] = broken
    with opened(ThreadLanes(execute, working=working)) as lanes:
        lanes.start(on("gpu", 0))
        died = lanes.report()
        lanes.start(on("cpu", 1))
        assert numbers(reports(lanes, 1)) == [1]
    assert isinstance(died, LaneDied)
    assert died.lane == "gpu"
    assert (died.error is BROKEN) if where == "entering" else isinstance(died.error, End)


# Virtual time


def times(jobs: Iterable[Job]) -> list[tuple[int, float]]:
    """Return when each job was done."""
    lanes = VirtualLanes(COSTS)
    started = list(jobs)
    for job in started:
        lanes.start(job)
    done = []
    for _ in started:
        report = lanes.report()
        assert isinstance(report, JobDone)
        done.append((report.job, lanes.now_s()))
    return done


def test_a_job_takes_what_the_cost_model_says() -> None:
    assert times([on("cpu", 0, 3)]) == [(0, 3 * CPU_S)]
    assert times([on("gpu", 0, 3)]) == [(0, 3 * GPU_S)]
    assert times([copy(0), copy(1)]) == [(0, COPY_S), (1, 2 * COPY_S)]
    assert times([RunDense(0, Wave(), 7.0)]) == [(0, 7.0)]


def test_cpu_and_link_slow_each_other_while_both_work_and_the_gpu_neither() -> None:
    done = dict(times([on("cpu", 0), on("gpu", 1), copy(2)]))
    copied = COPY_S * 1.5  # beside the CPU all the way
    computed = copied + (CPU_S - copied / 1.25)
    assert done == {1: GPU_S, 2: pytest.approx(copied), 0: pytest.approx(computed)}


def test_urgent_copies_overtake_in_virtual_time_too() -> None:
    jobs = [copy(0, urgent=False), copy(1, urgent=False), copy(2, urgent=False), copy(3), copy(4)]
    assert [number for number, _ in times(jobs)] == [0, 3, 4, 1, 2]


def test_one_thread_that_drives_all_lanes_lets_the_cpu_wait_and_counts_no_waiting() -> None:
    trace = Trace()
    lanes = VirtualLanes(COSTS, trace=trace, overlap=False)
    lanes.start(on("cpu", 0))
    lanes.start(copy(1))
    assert numbers(reports(lanes, 1)) == [1]
    lanes.start(on("gpu", 2))  # what has landed runs before the CPU begins
    took = {report.job: report.took_s for report in reports(lanes, 2) if isinstance(report, JobDone)}
    assert took == {0: CPU_S, 2: GPU_S}
    ran = {span.lane: (span.start_s, span.end_s) for span in trace.spans}
    landed = COPY_S + GPU_S
    assert ran == {"link": (0.0, COPY_S), "gpu": (COPY_S, landed), "cpu": (landed, landed + CPU_S)}
    assert lanes.busy_s == {"cpu": CPU_S, "gpu": GPU_S, "link": COPY_S}
    assert lanes.now_s() == CPU_S + GPU_S + COPY_S


def test_what_a_job_took_does_not_count_its_wait() -> None:
    lanes = VirtualLanes(COSTS)
    for number in range(3):
        lanes.start(on("cpu", number))
    took = [report.took_s for report in reports(lanes, 3) if isinstance(report, JobDone)]
    assert took == [pytest.approx(CPU_S)] * 3


def test_two_runs_give_the_same_times() -> None:
    jobs = [
        copy(n, urgent=n % 2 == 0) if n % 3 == 0 else on(("cpu", "gpu")[n % 2], n, 1 + n % 4) for n in range(50)
    ]
    assert times(jobs) == times(jobs)


def test_numbers_are_computed_when_a_job_ends() -> None:
    noted = Noted()
    lanes = VirtualLanes(COSTS, noted)
    lanes.start(on("cpu", 0))
    lanes.start(on("gpu", 1))
    assert noted.jobs == []
    lanes.report()
    assert noted.jobs == [1]
    lanes.report()
    assert noted.jobs == [1, 0]


def test_jobs_that_end_together_are_all_there_after_the_first() -> None:
    lanes = VirtualLanes(COSTS)
    for job in (on("gpu", 0, 3), RunDense(1, Wave(), 1.0), copy(2)):
        lanes.start(job)
    assert numbers([lanes.report()]) == [0]
    assert numbers(lanes.drain()) == [2]
    assert lanes.drain() == []


def test_busy_seconds_and_bytes_are_counted_by_lane() -> None:
    lanes = VirtualLanes(COSTS)
    lanes.start(on("gpu", 0, 2))
    lanes.start(copy(1))
    reports(lanes, 2)
    assert lanes.busy_s == {"cpu": 0.0, "gpu": 2 * GPU_S, "link": COPY_S}
    assert lanes.read_bytes == {"cpu": 0, "gpu": 2000, "link": 1000}


def test_waiting_in_virtual_time_with_nothing_in_flight_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no job is in flight"):
        VirtualLanes(COSTS).report()


def test_a_lane_that_died_in_virtual_time_does_not_hold_up_the_clock() -> None:
    def execute(job: Job) -> Failures:
        if job.lane == "gpu":
            raise BROKEN
        return {}

    lanes = VirtualLanes(COSTS, execute)
    for job in (on("gpu", 0), on("gpu", 1), on("cpu", 2)):
        lanes.start(job)
    assert lanes.report() == LaneDied("gpu", BROKEN)
    assert numbers([lanes.report()]) == [2]
    assert lanes.now_s() == CPU_S
    with pytest.raises(RuntimeError, match="no job is in flight"):
        lanes.report()
