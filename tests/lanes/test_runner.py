"""Driving waves: what one raises ends that one alone, and nothing that breaks makes anybody wait for ever."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from fiddler.cost.model import LANES, LaneName
from fiddler.errors import EngineFailedError
from fiddler.lanes.laneset import InlineLanes, LaneSet
from fiddler.lanes.runner import DrivenWave, Runner
from fiddler.lanes.threads import ThreadLanes
from fiddler.lanes.virtual import VirtualLanes
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import (
    CopyExpert,
    Failures,
    Job,
    LayerDone,
    Report,
    RunDense,
    RunExperts,
)
from fiddler.scheduler.plan import Planner, all_fetch
from tests.scheduler.desk import BROKEN, COSTS, LAYERS, Desk, work
from tests.support.covering import covering
from tests.support.patience import patience


class Walk(DrivenWave):
    """A wave that visits two experts in every layer; `raises` says in which call."""

    n_rows = 2
    n_context = 0

    def __init__(self, *experts: int, raises: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.experts = experts or (1, 2)
        self.raises = raises
        self.layer = -1
        self.dones: list[LayerDone] = []
        self.ends: list[BaseException | None] = []
        self.log: list[tuple[str, int]] = []

    def _call(self, name: str) -> None:
        assert not self.ends, f"{name} after the end"
        self.log.append((name, self.layer))
        if self.raises == (name, self.layer):
            raise BROKEN

    @property
    def at_end(self) -> bool:
        return self.layer + 1 == len(LAYERS)

    def launch(self) -> None:
        self.layer += 1
        self._call("launch")

    def advance(self) -> Layer | None:
        self._call("advance")
        if self.layer == len(LAYERS):
            return None
        return Layer(self, work(self.layer, dict.fromkeys(self.experts, 1)), 2, 1)

    def take(self, done: LayerDone) -> None:
        self._call("take")
        assert done.layer.index == self.layer
        self.dones.append(done)

    def end(self, error: BaseException | None) -> None:
        self.ends.append(error)


def nothing(job: Job) -> Failures:
    return {}


def runner(lanes: LaneSet, *, planner: Planner = all_fetch, promote: bool = True, n_slots: int = 3) -> Runner:
    return Runner(Desk(n_slots=n_slots, planner=planner, promote=promote).core, lanes)


@contextmanager
def driven(lanes: LaneSet, **options: Any) -> Generator[Runner]:
    """Settle and close in the end, and wait for nothing for ever: then nothing may be left."""
    with patience():
        driver = runner(lanes, **options)
        try:
            yield driver
        finally:
            driver.settle()
            lanes.close()
    assert driver.scheduler.idle
    assert not driver._running
    assert not driver._in_lanes
    assert not driver.scheduler.cache._slots.leases
    driver.scheduler.check()


def inline() -> LaneSet:
    return InlineLanes(nothing)


def threads() -> LaneSet:
    return ThreadLanes(nothing)


def virtual() -> LaneSet:
    return VirtualLanes(COSTS, nothing)


@pytest.fixture(params=[inline, threads, virtual])
def lanes(request: pytest.FixtureRequest) -> LaneSet:
    make: Callable[[], LaneSet] = request.param
    return make()


def test_waves_run_to_their_ends(lanes: LaneSet) -> None:
    with driven(lanes) as driver:
        waves = [Walk(1, 2), Walk(2, 3), Walk(4, 5)]
        driver.run(waves)
        assert [wave.ends for wave in waves] == [[None]] * 3
        assert [[done.layer.index for done in wave.dones] for wave in waves] == [[0, 1, 2]] * 3
        assert not any(done.failures for wave in waves for done in wave.dones)


RAISES = (
    *(("launch", 0), ("launch", 2), ("launch", 3)),
    *(("advance", 0), ("advance", 2), ("advance", 3)),
    *(("take", 0), ("take", 2)),
)


@pytest.mark.parametrize(
    ("lanes", "raises", "in_order", "which"),
    covering((inline, threads, virtual), RAISES, (False, True), (0, 1), strength=3),
    ids=lambda value: value.__name__ if callable(value) else str(value),
    indirect=["lanes"],
)
def test_what_a_wave_raises_ends_that_wave_alone(
    lanes: LaneSet, raises: tuple[str, int], in_order: bool, which: int
) -> None:
    with driven(lanes) as driver:
        waves = [Walk(1, 2), Walk(2, 3)]
        waves[which].raises = raises
        driver.run(waves, in_order=in_order)
        assert waves[which].ends == [BROKEN]
        assert waves[1 - which].ends == [None]
        assert len(waves[1 - which].dones) == 3


def test_in_order_no_wave_overtakes_the_one_in_front(lanes: LaneSet) -> None:
    with driven(lanes) as driver:
        order: list[tuple[int, int]] = []

        class Noting(Walk):
            def launch(self) -> None:
                order.append((waves.index(self), self.layer + 1))
                super().launch()

        waves = [Noting(1, 2, 3, 4), Noting(5), Noting(5)]
        waves[1].experts = waves[2].experts = ()  # nothing but the order holds them up
        driver.run(waves, in_order=True)
    for layer in range(len(LAYERS) + 1):
        assert [order.index((wave, layer)) for wave in range(3)] == sorted(
            order.index((wave, layer)) for wave in range(3)
        )


class Stubborn(VirtualLanes):
    """Lanes of which some refuse jobs."""

    def __init__(self, *refusing: LaneName) -> None:
        super().__init__(COSTS)
        self.refusing = refusing

    def start(self, job: Job) -> None:
        if job.lane in self.refusing:
            raise BROKEN
        super().start(job)


@pytest.mark.parametrize("lane", LANES)
def test_a_lane_that_takes_no_job_counts_as_dead(lane: LaneName) -> None:
    with driven(Stubborn(lane)) as driver:
        waves = [Walk(1, 2), Walk(2, 3)]
        driver.run(waves)
        assert [wave.ends for wave in waves] == [[None]] * 2
        assert lane == "cpu" or not any(done.failures for wave in waves for done in wave.dones)


def test_without_any_lane_waves_end_with_failures() -> None:
    with driven(Stubborn(*LANES)) as driver:
        wave = Walk(1, 2)
        driver.run([wave])
        assert [done.failures for done in wave.dones] == [{1: BROKEN, 2: BROKEN}] * 3


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", ["threads", "virtual"])
def test_a_lane_that_dies_is_done_without_and_settling_does_not_wait_for_it(kind: str, lane: LaneName) -> None:
    def execute(job: Job) -> Failures:
        if job.lane == lane and job.job > 3 and not isinstance(job, RunDense):
            raise BROKEN
        return {}

    made = ThreadLanes(execute) if kind == "threads" else VirtualLanes(COSTS, execute)
    with driven(made, n_slots=1) as driver:
        for _ in range(3):
            waves = [Walk(1, 2), Walk(2, 3), Walk(4, 5)]
            driver.run(waves)
            assert [wave.ends for wave in waves] == [[None]] * 3
            failures = [done for wave in waves for done in wave.dones if done.failures]
            assert lane == "cpu" or not failures
        driver.settle()
        driver.settle()


def test_an_error_of_the_schedulers_own_ends_the_run_and_not_the_runner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with driven(threads()) as driver:
        with monkeypatch.context() as patch:
            patch.setattr(driver.scheduler._placing, "plan", raise_broken)
            waves = [Walk(1, 2), Walk(2, 3)]
            with pytest.raises(RuntimeError, match="broken"):
                driver.run(waves)
        assert [type(error) for wave in waves for error in wave.ends] == [EngineFailedError] * 2
        wave = Walk(1, 2)
        driver.run([wave])
        assert wave.ends == [None]


def raise_broken(*_: object) -> None:
    raise BROKEN


class Silent(InlineLanes):
    """Lanes that forget what they were asked for."""

    def start(self, job: Job) -> None:
        super().start(job)
        self._reports.clear()


def test_waves_that_no_lane_works_for_are_an_error_and_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with patience():
        driver = runner(virtual())
        monkeypatch.setattr(driver.scheduler, "_dispatch", lambda *_: iter(()))
        wave = Walk(1, 2)
        with pytest.raises(RuntimeError, match="no lane"):
            driver.run([wave])
        assert [type(error) for error in wave.ends] == [EngineFailedError]
        driver.settle()
        with pytest.raises(RuntimeError, match="no job is in flight"):
            runner(Silent(nothing)).run([Walk(1, 2)])


@pytest.mark.parametrize("in_order", [False, True])
def test_a_run_that_is_interrupted_gives_up_its_waves_and_the_next_goes_on(in_order: bool) -> None:
    class Interrupted(VirtualLanes):
        def report(self) -> Report:
            if len(waves[0].dones) == 1:
                raise KeyboardInterrupt
            return super().report()

    lanes = Interrupted(COSTS, nothing)
    with driven(lanes) as driver:
        waves: Sequence[Walk] = [Walk(1, 2), Walk(2, 3)]
        with pytest.raises(KeyboardInterrupt):
            driver.run(waves, in_order=in_order)
        assert [[type(error) for error in wave.ends] for wave in waves] == [[EngineFailedError]] * 2
        assert len([entry for entry in waves[1].log if entry[0] == "advance"]) <= 2
        first, waves = waves[0], [Walk(4, 5)]
        waves[0].dones += first.dones * 2
        driver.run(waves, in_order=in_order)
        assert waves[0].ends == [None]


def test_an_error_while_waves_wait_in_order_lets_none_of_them_go_on() -> None:
    class Broken(VirtualLanes):
        def report(self) -> Report:
            if broken:
                raise BROKEN
            return super().report()

    broken = True
    with driven(Broken(COSTS, nothing)) as driver:
        waves = [Walk(1, 2), Walk(2, 3), Walk(3, 4)]
        with pytest.raises(RuntimeError, match="broken"):
            driver.run(waves, in_order=True)
        assert [wave.log for wave in waves] == [[("launch", 0)], [], []]
        assert [len(wave.ends) for wave in waves] == [1, 1, 1]
        broken = False


def test_failures_reach_the_wave_they_concern() -> None:
    def execute(job: Job) -> Failures:
        if isinstance(job, RunExperts) and job.lane == "cpu":
            return {load.expert: BROKEN for load in job.loads if load.expert == 2}
        return {job.expert: BROKEN} if isinstance(job, CopyExpert) and job.expert == 3 else {}

    with driven(VirtualLanes(COSTS, execute), n_slots=0) as driver:
        waves = [Walk(1, 2), Walk(3, 4)]
        driver.run(waves)
        assert [done.failures for done in waves[0].dones] == [{2: BROKEN}] * 3
        assert [done.failures for done in waves[1].dones] == [{}] * 3


def test_settling_waits_for_copies_that_outlive_their_step() -> None:
    with driven(virtual(), n_slots=2) as driver:
        driver.run([Walk(1, 2)])
        before = driver.scheduler.counters.n_promotions
        driver.settle()
        assert driver.scheduler.idle
        assert driver.scheduler.counters.n_promotions == before
