"""A scheduler with its lanes worked by hand, and books of its own: what each slot holds and what has run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from fiddler.cache.cache import ExpertCache
from fiddler.cost.model import LANES, Contention, CostModel, Curve, Dense, ExpertCosts, LaneName, Moves
from fiddler.lab.policies import make_policy
from fiddler.lab.systems import prefetch_of
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.messages import (
    CopyExpert,
    CopyOrdered,
    DenseDone,
    DenseQueued,
    Event,
    Failures,
    Job,
    JobDone,
    LaneDied,
    LayerDone,
    LayerReady,
    RunExperts,
    WaveDropped,
)
from fiddler.scheduler.plan import Planner, all_cpu, all_fetch
from fiddler.scheduler.routing import LayerWork, Load

LAYERS = (6, 6, 6)
COSTS = CostModel(
    experts=(ExpertCosts(Curve(((1.0, 4e-3),)), Curve(((1.0, 1e-3),)), 3e-3, 1000),) * len(LAYERS),
    contention=Contention(1.25, 1.5),
    moves=Moves(1e-4, 1e-6),
    dense=Dense(Curve(((1.0, 2e-3),)), head=Curve(((1.0, 1e-3),))),
)
BROKEN = RuntimeError("broken")
Rows = Mapping[int, int]


def work(layer: int, now: Rows, late: Rows | None = None) -> LayerWork:
    """Return a layer's work from rows by expert."""
    n = 0
    parts: list[tuple[Load, ...]] = []
    for rows in (now, late or {}):
        loads = []
        for expert, n_rows in sorted(rows.items()):
            loads.append(Load(expert, n, n + n_rows))
            n += n_rows
        parts.append(tuple(loads))
    return LayerWork(layer, parts[0], tuple(range(n)), parts[1])


class Passed(NamedTuple):
    """A `LayerDone`, or with no layer a `DenseDone`, as numbers."""

    wave: int
    layer: int | None
    failures: Failures = MappingProxyType({})
    late_failures: Failures = MappingProxyType({})


@dataclass
class _Visit:
    """A layer of a wave, as its loads are seen to run."""

    work: LayerWork
    ran: set[Load] = field(default_factory=set)
    done: bool = False


class Desk:
    """Checks the scheduler after every event, and every command against its own books."""

    def __init__(
        self,
        *,
        n_slots: int = 4,
        n_staging: int = 0,
        planner: Planner = all_cpu,
        promote: bool = False,
        policy: str = "lru",
        prefetch: str = "off",
    ) -> None:
        self.cache = ExpertCache(n_slots + n_staging, LAYERS, make_policy(policy, LAYERS), n_staging=n_staging)
        ahead = prefetch_of(prefetch, self.cache)
        self.core = Scheduler(self.cache, COSTS, planner=planner, promote=promote, ahead=ahead)
        self.queues: dict[LaneName, list[Job]] = {lane: [] for lane in LANES}
        self.dead: set[LaneName] = set()
        self.done: list[Passed] = []
        self.dense: list[int] = []
        """Waves whose dense part is through."""
        self.now_s = 0.0
        self.holds: dict[int, tuple[int, int]] = {}
        """By slot, what was copied there."""
        self.visits: dict[tuple[int, int], _Visit] = {}
        self.waves: dict[int, Wave] = {}
        self.dropped: set[int] = set()
        self.ordered: set[int] = set()
        """Copies under way that the GPU puts before whatever it is given next."""
        self.early: set[int] = set()
        """Jobs that were given to the GPU before their copies had landed: it keeps the order, no lease does."""

    # Events

    def ready(
        self, wave: int, layer: int, now: Rows, late: Rows | None = None, ahead: Rows | None = None
    ) -> list[Job | Passed]:
        """Let a wave arrive at a layer, with what a look-ahead expects in the next."""
        asked = work(layer, now, late)
        self.visits[wave, layer] = _Visit(asked)
        expected = tuple((ahead or {}).items())
        return self.tell(LayerReady(Layer(self.wave(wave), asked, max(1, len(asked.order)), 1, ahead=expected)))

    def report(
        self, job: Job, failures: Failures | None = None, *, took_s: float | None = None
    ) -> list[Job | Passed]:
        """Let a lane be through with a job."""
        self.queues[job.lane].remove(job)
        failures = failures or {}
        match job:
            case RunExperts():
                self._ran(job, failures)
            case CopyExpert() if not failures:
                self.holds[job.slot] = job.layer, job.expert
        self.ordered.discard(job.job)
        return self.tell(JobDone(job.job, job.predicted_s if took_s is None else took_s, failures))

    def order(self, copy: CopyExpert) -> list[Job | Passed]:
        """Let the GPU put a copy before whatever it is given next."""
        self.ordered.add(copy.job)
        self.holds[copy.slot] = copy.layer, copy.expert
        return self.tell(CopyOrdered(copy.job))

    def queue(self, job: RunExperts) -> list[Job | Passed]:
        """Let the GPU lane be done with a job that it has only queued."""
        self.queues[job.lane].remove(job)
        self._ran(job, {})
        return self.tell(JobDone(job.job, None))

    def fail(self, job: Job) -> list[Job | Passed]:
        """Let a lane fail to do any of a job."""
        return self.report(job, dict.fromkeys(experts(job), BROKEN))

    def die(self, lane: LaneName) -> list[Job | Passed]:
        """Let a lane end."""
        self.queues[lane].clear()
        self.dead.add(lane)
        return self.tell(LaneDied(lane, BROKEN))

    def drop(self, wave: int) -> list[Job | Passed]:
        """Let nobody wait for a wave any more."""
        self.dropped.add(wave)
        return self.tell(WaveDropped(self.wave(wave)))

    def tell(self, event: Event) -> list[Job | Passed]:
        """Let a millisecond pass and something happen."""
        self.now_s += 1e-3
        commands: list[Job | Passed] = []
        for command in self.core.handle(event, self.now_s):
            match command:
                case LayerDone(layer, failures, late_failures):
                    passed = Passed(layer.wave.number, layer.index, failures, late_failures)
                    commands.append(passed)
                    self._passed(passed)
                case DenseDone(wave):
                    commands.append(Passed(wave.number, None))
                    self.dense.append(wave.number)
                case job:
                    commands.append(job)
                    self._started(job)
        self.core.check()
        self._check_leases()
        self._check_prefetch()
        return commands

    def dense_queued(self, wave: int, *, head: bool = False) -> list[Job | Passed]:
        """Let a wave go on to its next dense part."""
        return self.tell(DenseQueued(self.wave(wave), 1, 0, head=head))

    def wave(self, number: int) -> Wave:
        """Return a wave by its number."""
        wave = self.waves.setdefault(number, Wave())
        wave.number = number
        return wave

    # Reading

    @property
    def jobs(self) -> list[Job]:
        """Every job in a lane."""
        return [job for lane in LANES for job in self.queues[lane]]

    def only(self, lane: LaneName) -> Job:
        """Return the one job of a lane."""
        (job,) = self.queues[lane]
        return job

    def finish(self) -> None:
        """Let the lanes work until none has anything to do."""
        while self.jobs:
            for lane in LANES:
                if self.queues[lane]:
                    self.report(self.queues[lane][0])

    def assert_nothing_is_left(self) -> None:
        """Once all waves are dropped and the lanes are through."""
        assert self.core.idle
        assert not self.core._copies.waiting
        assert self.core.backlog().cpu_s == self.core.backlog().gpu_s == self.core.backlog().link_s == 0.0
        assert not self.cache._slots.leases
        assert self.cache.n_free + self.cache.n_ready == self.cache.n_slots
        assert not self.core.prefetcher._expecting
        assert not any(wave.latest or wave.coming for wave in self.waves.values())
        assert not self.core.prefetcher._due

    # Its own books

    def _started(self, job: Job) -> None:
        assert job.lane not in self.dead, "a dead lane was given a job"
        self.queues[job.lane].append(job)
        match job:
            case CopyExpert(slot=slot):
                others = [other for other in self._on_gpu() if other.job not in self.early]
                assert all(slot not in other.slots for other in others), "a slot in use is written"
                assert slot not in [c.slot for c in self._copies() if c is not job], "two copies into one slot"
                assert job.urgent or self.queues["link"] == [job], "an idle link is all that nobody waits for gets"
                assert not job.urgent or job.layer in {layer.index for layer in self.core.layers}
                self.holds.pop(slot, None)
            case RunExperts(lane="gpu"):
                self._holds_its_experts(job)
                if {copy.slot for copy in self._copies() if copy.job in self.ordered} & {*job.slots}:
                    self.early.add(job.job)

    def _ran(self, job: RunExperts, failures: Failures) -> None:
        if job.lane == "gpu" and job.job not in self.early:
            self._holds_its_experts(job)
        visit = self.visits[job.layer.wave.number, job.layer.index]
        for load in job.loads:
            if load.expert not in failures:
                assert load not in visit.ran, "a load ran twice"
                visit.ran.add(load)

    def _holds_its_experts(self, job: RunExperts) -> None:
        assert [self.holds.get(slot) for slot in job.slots] == [
            (job.layer.index, load.expert) for load in job.loads
        ]

    def _on_gpu(self) -> list[RunExperts]:
        return [job for job in self.queues["gpu"] if isinstance(job, RunExperts)]

    def _copies(self) -> list[CopyExpert]:
        return [job for job in self.queues["link"] if isinstance(job, CopyExpert)]

    def _passed(self, done: Passed) -> None:
        """A layer is passed once, with all its loads run or failed, and the deferred ones of the layer before."""
        assert done.wave not in self.dropped
        assert done.layer is not None
        visit = self.visits[done.wave, done.layer]
        assert not visit.done
        visit.done = True
        assert not missing(visit.work.loads, visit.ran, done.failures)
        before = self.visits.get((done.wave, done.layer - 1))
        if before is not None:
            assert not missing(before.work.deferred, before.ran, done.late_failures)
        else:
            assert not done.late_failures
        self.done.append(done)

    def _check_leases(self) -> None:
        prefetcher = self.core.prefetcher
        assert not prefetcher._due, "a layer has come, and what was kept for it still is"
        ahead = [wave.coming for wave in prefetcher._expecting if wave.coming is not None]
        held = Counter((layer.index, expert) for layer in self.core.layers for expert in layer.leased)
        held.update((coming.layer, expert) for coming in ahead for expert in coming.leased)
        assert held == self.cache._slots.leases
        assert not any(layer.reported and layer.before for layer in self.core.layers), "a layer is kept for nothing"

    def _check_prefetch(self) -> None:
        prefetcher = self.core.prefetcher
        use, at = prefetcher.use, dict(iter(self.visits))
        assert 0 <= max(use.n_landed, use.n_used) <= use.n_settled <= use.n_issued
        assert 0 <= use.n_true <= use.n_guesses
        assert use.gained_s >= 0.0 <= min(use.cost_s, use.delay_s)
        assert all(0.0 <= chance <= 1.0 for chance in prefetcher._chances)
        for wave in prefetcher._expecting:
            coming = wave.coming
            assert coming is not None
            assert wave.number not in self.dropped
            assert coming.layer == at[wave.number] + 1 < len(LAYERS)
            assert len({guess.expert for guess in coming.guesses}) == len(coming.guesses)
            assert len(set(coming.leased)) == len(coming.leased)
            landed = {e for e in coming.copied if self.cache.slot((coming.layer, e)) is not None}
            assert landed == set(coming.leased), "what has landed is kept, and nothing else is"


def resident(desk: Desk, layer: int, *wanted: int) -> None:
    """Bring experts in, by a wave that then ends."""
    planner, desk.core.planner = desk.core.planner, all_fetch
    desk.ready(1000, layer, dict.fromkeys(wanted, 1))
    desk.finish()
    desk.drop(1000)
    desk.core.planner = planner
    desk.visits.clear()
    desk.done.clear()
    desk.dropped.clear()
    desk.waves.clear()
    assert all(desk.cache.slot((layer, expert)) is not None for expert in wanted)


def kinds(jobs: Sequence[Job]) -> list[tuple[str, list[int]]]:
    """Return jobs as their lanes and experts."""
    return [(job.lane, experts(job)) for job in jobs]


def missing(loads: tuple[Load, ...], ran: set[Load], failures: Failures) -> list[Load]:
    """Return the loads that neither ran nor failed, or did both."""
    return [load for load in loads if (load in ran) is (load.expert in failures)]


def experts(job: Job) -> list[int]:
    """Return the experts a job is about."""
    match job:
        case RunExperts():
            return [load.expert for load in job.loads]
        case CopyExpert():
            return [job.expert]
        case _:
            return []
