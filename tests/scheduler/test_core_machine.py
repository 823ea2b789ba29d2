"""Anything that can happen to the scheduler, in any order: `Desk` checks both their books after every event."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fiddler.cost.model import LANES, LaneName
from fiddler.lab.systems import PLANNERS, PREFETCH
from fiddler.scheduler.messages import CopyExpert, Job, RunExperts
from tests.scheduler.desk import BROKEN, LAYERS, Desk, experts

ROWS = st.dictionaries(st.integers(0, LAYERS[0] - 1), st.integers(1, 3), max_size=4)
POLICIES = ("aged-lfu", "lru", "layer-lru", "hybrimoe", "static")


class CoreMachine(RuleBasedStateMachine):
    """Waves come, pass layers and go; each lane works in its own time, and may fail or die."""

    def __init__(self) -> None:
        super().__init__()
        self.n_waves = 0
        self.at: dict[int, int] = {}
        """By wave that is there, the layers it has begun."""

    @initialize(
        n_slots=st.integers(0, 5),
        planner=st.sampled_from(list(PLANNERS.values())),
        promote=st.booleans(),
        policy=st.sampled_from(POLICIES),
        prefetch=st.sampled_from(tuple(PREFETCH)),
        n_staging=st.integers(0, 3),
    )
    def open(self, **options: Any) -> None:
        self.desk = Desk(**options)

    def n_passed(self, wave: int) -> int:
        return sum(done.wave == wave for done in self.desk.done)

    def waiting(self) -> list[int]:
        """Waves that can go on."""
        return [wave for wave, begun in self.at.items() if begun == self.n_passed(wave)]

    @precondition(lambda self: len(self.at) < 4)
    @rule(now=ROWS, late=ROWS, ahead=ROWS)
    def begin(self, now: dict[int, int], late: dict[int, int], ahead: dict[int, int]) -> None:
        self.at[self.n_waves] = 1
        self.desk.ready(self.n_waves, 0, now, late, ahead)
        self.n_waves += 1

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), now=ROWS, late=ROWS, ahead=ROWS)
    def go_on(self, data: st.DataObject, now: dict[int, int], late: dict[int, int], ahead: dict[int, int]) -> None:
        wave = data.draw(st.sampled_from(self.waiting()))
        layer = self.at[wave]
        if layer == len(LAYERS):
            self.drop(wave)
            return
        self.at[wave] += 1
        more = layer + 1 < len(LAYERS)
        self.desk.ready(wave, layer, now, late if more else {}, ahead if more else {})

    @precondition(lambda self: self.at)
    @rule(data=st.data(), head=st.booleans())
    def dense(self, data: st.DataObject, head: bool) -> None:
        self.desk.dense_queued(data.draw(st.sampled_from(sorted(self.at))), head=head)

    @precondition(lambda self: self.desk.jobs)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        self.desk.report(self.drawn(data))

    @precondition(lambda self: self.unordered())
    @rule(data=st.data())
    def order(self, data: st.DataObject) -> None:
        self.desk.order(data.draw(st.sampled_from(self.unordered())))

    def unordered(self) -> list[CopyExpert]:
        copies = [job for job in self.desk.queues["link"] if isinstance(job, CopyExpert)]
        return [copy for copy in copies if copy.job not in self.desk.ordered]

    @precondition(lambda self: self.on_gpu())
    @rule()
    def queue(self) -> None:
        self.desk.queue(self.on_gpu()[0])

    def on_gpu(self) -> list[RunExperts]:
        return [job for job in self.desk.queues["gpu"][:1] if isinstance(job, RunExperts)]

    @precondition(lambda self: self.desk.jobs)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        job = self.drawn(data)
        if job.job in self.desk.ordered:  # it has been queued, and can only land or take its lane with it
            return
        failed = data.draw(st.sets(st.sampled_from(experts(job) or [0])))
        self.desk.report(job, dict.fromkeys(failed & {*experts(job)}, BROKEN))

    def drawn(self, data: st.DataObject) -> Job:
        """Of some lane, the job that comes first; the link may take an urgent one before."""
        lane: LaneName = data.draw(st.sampled_from([lane for lane in LANES if self.desk.queues[lane]]))
        queue = self.desk.queues[lane]
        return data.draw(st.sampled_from(queue)) if lane == "link" else queue[0]

    @rule(lane=st.sampled_from(LANES), rarely=st.integers(0, 9))
    def die(self, lane: LaneName, rarely: int) -> None:
        if rarely == 0:
            self.desk.die(lane)

    @precondition(lambda self: self.at)
    @rule(data=st.data(), rarely=st.integers(0, 3))
    def leave(self, data: st.DataObject, rarely: int) -> None:
        wave = data.draw(st.sampled_from(sorted(self.at)))
        if rarely == 0:
            self.drop(wave)

    def drop(self, wave: int) -> None:
        del self.at[wave]
        self.desk.drop(wave)

    def teardown(self) -> None:
        if not hasattr(self, "desk"):
            return
        self.desk.finish()
        assert set(self.waiting()) == set(self.at), "a layer waits and no lane has anything to do"
        for wave in list(self.at):
            self.drop(wave)
        self.desk.finish()
        self.desk.assert_nothing_is_left()


TestCore: Any = CoreMachine.TestCase
TestCore.settings = settings(max_examples=200, stateful_step_count=40)
