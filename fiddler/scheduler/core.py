"""The scheduler: events in, commands out; no clock and no threads of its own.

Every load of a layer is in one place at a time: in a lane, waiting for its expert to land, or done. What fails
falls back to the CPU, which needs neither a slot nor a copy; what fails there fails for good. Without link or GPU
all that cannot run from a slot goes to the CPU; without the CPU what can be fetched is, and the rest fails.

What a plan is told of a layer's loads: where their weights are, and what the cache holds them to be worth.
"""

from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cache.slots import Reservation
from fiddler.cost.correction import Correction
from fiddler.cost.lanes import LaneName
from fiddler.cost.model import CostModel
from fiddler.scheduler.guesses import Nobody, Predictor, Rule, pays, promotion
from fiddler.scheduler.jobs import Copies, Jobs, undone
from fiddler.scheduler.layer import LayerRun, LayerRuns
from fiddler.scheduler.messages import (
    Command,
    CopyExpert,
    CopyOrdered,
    DenseDone,
    DenseQueued,
    Event,
    Failures,
    JobDone,
    JobTook,
    LaneDied,
    LayerReady,
    LayerTook,
    Reason,
    RunDense,
    RunExperts,
    WaveDropped,
)
from fiddler.scheduler.plan import Backlog, Candidate, Plan, Planner, all_fetch, assign, best_cut
from fiddler.scheduler.prefetch import Prefetcher
from fiddler.scheduler.routing import Load
from fiddler.scheduler.statistics import Counters, LayerRecords
from fiddler.trace import Trace
from fiddler.types import PrefetchStatistics


def candidates(run: LayerRun, loads: Sequence[Load], cache: ExpertCache, copies: Copies | None) -> list[Candidate]:
    """Return a candidate for each load of a layer; without `copies` none is on its way."""

    def candidate(load: Load) -> Candidate:
        key = (run.layer, load.expert)
        if load.expert in run.leased:
            return Candidate(load, "hit")
        ahead_s = copies.ahead_s(key) if copies is not None else None
        if ahead_s is not None:
            return Candidate(load, "landing", ahead_s=ahead_s)
        score = run.scores[load.expert] if run.scores else cache.score(key)
        return Candidate(load, "miss", score=score)

    return [candidate(load) for load in loads]


class Scheduler:
    """Decides where every load of every layer runs; the owners of all that is in flight are its own."""

    def __init__(
        self,
        cache: ExpertCache,
        costs: CostModel,
        *,
        planner: Planner = best_cut,
        promote: bool = True,
        ahead: tuple[Predictor, Rule] = (Nobody(), pays),
        trace: Trace | None = None,
    ) -> None:
        self.cache = cache
        self.correction = Correction(costs)
        self.counters = Counters()
        self.recent: defaultdict[int, deque[LayerReady]] = defaultdict(lambda: deque(maxlen=2))
        """By layer, the latest: one or two waves of a step."""
        self.planner = planner
        self._promote = promote
        self._jobs = Jobs(self.correction)
        self._runs = LayerRuns()
        self._copies = Copies(cache, self._jobs)
        self.prefetcher = Prefetcher(*ahead, cache, self._copies.ahead_s)
        self._records = LayerRecords(self.counters, trace)
        self._now_s = 0.0

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take note of what happened at `now_s`, seconds on a clock that never goes back; return what to do."""
        self._jobs.pass_to(now_s)
        self._now_s = now_s
        match event:
            case LayerReady():
                return list(self._begin(event))
            case JobDone():
                return list(self._done(event))
            case DenseQueued(wave):  # without a GPU its time is all that is asked for
                return [DenseDone(wave) if "gpu" in self._jobs.dead else self._jobs.dense(event)]
            case CopyOrdered(job):
                return list(self._ordered(job))
            case LaneDied():
                return list(self._bury(event))
            case JobTook(lane, predicted_s, took_s):
                self.correction.report(lane, predicted_s, took_s)
            case LayerTook():
                self._records.took(event)
            case WaveDropped(wave):
                self._drop(wave)
        return []

    def preload(self, order: Sequence[Key] | None = None) -> list[Command]:
        """Return the copies that fill the free slots before anything runs: in this order, or by worth."""
        order = self.cache.best(self.cache.n_slots) if order is None else order
        return [self._copy(reservation, "promotion") for reservation in self.cache.fill(order)]

    @property
    def idle(self) -> bool:
        """Whether no wave is on its way and no lane has anything to do."""
        return not self._jobs and not self._runs

    @property
    def prefetched(self) -> PrefetchStatistics:
        """What copying ahead came to."""
        return self.prefetcher.statistics()

    @property
    def dead(self) -> Mapping[LaneName, BaseException]:
        """Lanes that are done without, and why."""
        return self._jobs.dead

    def backlog(self) -> Backlog:
        """Return the work queued in each lane."""
        return self._jobs.backlog()

    def _begin(self, event: LayerReady) -> Iterator[Command]:
        work = event.work
        self.recent[work.layer].append(event)
        rows = work.rows
        self.prefetcher.come(event, rows, self._now_s, self.correction.costs)
        run = LayerRun(event.wave, work, self._now_s)
        if self.cache.policy.by_recency:
            run.scores = {expert: self.cache.score((work.layer, expert)) for expert in rows}
        self.cache.observe(work.layer, list(rows.items()), event.n_tokens, event.scores)
        self._runs.begin(run)
        for expert in rows:  # wherever they will run: the layer's own fetches must not evict them
            self._pin(run, expert)
        self.prefetcher.let_go()
        run.plan = yield from self._dispatch(run, work.loads)
        if work.deferred:
            yield from self._dispatch(run, work.deferred)
        yield from self._fill_link(run)
        yield from self._settle(run)

    def _pin(self, run: LayerRun, expert: int) -> None:
        """Keep an expert's slot, if it has one, while a layer runs."""
        key = (run.layer, expert)
        if expert not in run.leased and self.cache.slot(key) is not None and "gpu" not in self._jobs.dead:
            self.cache.lease(key)
            run.leased.append(expert)

    def _plan(self, run: LayerRun, loads: Sequence[Load]) -> tuple[Plan, dict[Load, Reservation]]:
        """Return who runs what, and the slots of those that are fetched."""
        dead, costs, backlog, layer = self._jobs.dead, self.correction.costs, self.backlog(), run.layer
        seen = candidates(run, loads, self.cache, None if "gpu" in dead else self._copies)
        # How many the cache would admit is not asked beforehand: the few that it refuses run on the CPU.
        n_fetch = len(seen) if self.cache.n_slots and not dead.keys() & {"link", "gpu"} else 0
        plan = (all_fetch if "cpu" in dead else self.planner)(layer, seen, costs, backlog, n_fetch)
        asked = {load: self.cache.reserve((layer, load.expert)) for load in plan.fetch}
        slots = {load: reservation for load, reservation in asked.items() if reservation is not None}
        if len(slots) < len(asked):
            by_load = {c.load: c for c in seen}
            on_gpu = [by_load[load] for load in (*plan.gpu, *slots)]
            plan = assign(layer, [c for c in seen if c not in on_gpu], on_gpu, costs, backlog)
        return plan, slots

    def _dispatch(self, run: LayerRun, loads: Sequence[Load]) -> Generator[Command, None, Plan]:
        plan, slots = self._plan(run, loads)
        ready = tuple(load for load in plan.gpu if load.expert in run.leased)
        landing = [load for load in plan.gpu if load.expert not in run.leased]
        self.counters.planned(hits=len(plan.gpu), cpu=len(plan.cpu), fetches=len(plan.fetch))
        if ready:
            yield self._run_gpu(run, ready)
        yield from self._run_cpu(run, plan.cpu)
        for load in landing:
            if not self._copies.wait(run, load):
                yield self._run_gpu(run, (load,))
        for load in plan.fetch:
            yield self._copy(slots[load], "demand", (run, load))
        return plan

    def _settle(self, run: LayerRun) -> Iterator[Command]:
        """Let a layer's forward go on if it can, and let go of what nobody needs."""
        if run.complete:
            self._release(run)
        latest = self._runs.latest(run.wave)
        if latest is not None and latest.passable and not latest.reported:
            self._records.passed(latest, self._now_s)
            self.prefetcher.passed(run.wave, self._now_s)
            yield latest.report()

    def _release(self, run: LayerRun) -> None:
        for expert in run.leased:
            self.cache.release((run.layer, expert))
        run.leased.clear()
        self._runs.forget(run)

    def _run_gpu(self, run: LayerRun, loads: tuple[Load, ...]) -> Command:
        return self._jobs.on_gpu(run, loads, tuple(self._copies.slot((run.layer, load.expert)) for load in loads))

    def _run_cpu(self, run: LayerRun, loads: tuple[Load, ...]) -> Iterator[Command]:
        error = self._jobs.dead.get("cpu")
        if error is not None:
            for load in loads:
                run.fail(load, error)
        elif loads:
            yield self._jobs.on_cpu(run, loads)

    def _copy(self, reservation: Reservation, reason: Reason, *waiting: tuple[LayerRun, Load]) -> Command:
        if reason == "demand":
            self.prefetcher.waited(self._jobs.ahead_of_demand_s())
        self.counters.copied(self.correction.costs.experts[reservation.key[0]].nbytes)
        return self._copies.start(reservation, reason, *waiting)

    def _fill_link(self, run: LayerRun | None = None) -> Iterator[Command]:
        """If the link has nothing to do: copy in what a next layer may visit, or what this one misses often."""
        if not self.cache.n_slots or self._jobs.dead or not self._jobs.idle("link"):
            return
        costs, backlog = self.correction.costs, self.backlog()
        reservation = self.prefetcher.choose(costs, backlog, self.planner)
        if reservation is not None:
            yield self._copy(reservation, "ahead")
        elif self._promote and run is not None and run.plan is not None:
            missed = [(run.layer, load.expert) for load in run.plan.cpu]
            reservation = promotion(self.cache, missed, costs, backlog.cpu_s, self.prefetcher.gap_s)
            if reservation is not None:
                self.counters.n_promotions += 1
                yield self._copy(reservation, "promotion")

    def _done(self, event: JobDone) -> Iterator[Command]:
        ended = self._jobs.end(event.job)
        if ended is None:
            return
        job, predicted_s = ended
        # a job's time tells of its costs only if its rows were there: those of a wave that is gone may not be
        told = isinstance(job, CopyExpert) or (isinstance(job, RunExperts) and self._runs.awaited(job.wave))
        if told and not event.failures and event.took_s is not None:
            self.correction.report(job.lane, predicted_s, event.took_s)
        match job:
            case CopyExpert():
                yield from self._landed((job.layer, job.expert), failed=bool(event.failures))
            case RunExperts():
                yield from self._ran(job, event.failures, unended=event.took_s is None)
            case RunDense():
                yield DenseDone(job.wave)
        if isinstance(job, CopyExpert) or (isinstance(job, RunExperts) and job.lane == "cpu"):
            yield from self._fill_link()

    def _ordered(self, job: int) -> Iterator[Command]:
        """Give the GPU what waits for a copy: it keeps the order itself."""
        if "gpu" not in self._jobs.dead:
            for run, load in self._copies.order(job):
                yield self._run_gpu(run, (load,))

    def _landed(self, key: Key, *, failed: bool) -> Iterator[Command]:
        for run, load in self._copies.end(key, self.prefetcher.landed, failed=failed):
            if failed or "gpu" in self._jobs.dead:
                self.counters.n_fallbacks += 1
                yield from self._run_cpu(run, (load,))
                yield from self._settle(run)
            else:
                self._pin(run, load.expert)
                yield self._run_gpu(run, (load,))

    def _ran(self, job: RunExperts, failures: Failures, *, unended: bool) -> Iterator[Command]:
        run = self._runs.find(job.wave, job.layer)
        run.unended |= unended
        failed = tuple(load for load in job.loads if load.expert in failures)
        if job.lane == "gpu" and self._runs.awaited(job.wave):
            run.ran([load for load in job.loads if load not in failed])
            self.counters.n_fallbacks += len(failed)
            yield from self._run_cpu(run, failed)
        else:
            for load in failed:
                run.fail(load, failures[load.expert])
            run.ran(job.loads)
        yield from self._settle(run)

    def _bury(self, event: LaneDied) -> Iterator[Command]:
        """Do without a lane: what it had goes to the CPU, what the CPU had fails."""
        self._jobs.dead[event.lane] = event.error
        for job in self._jobs.all:
            if job.lane == event.lane:
                yield from self._done(JobDone(job.job, 0.0, undone(job, event.error)))

    def _drop(self, wave: int) -> None:
        """Forget a wave; its loads that are in lanes run to their end, the others are let go."""
        self._copies.drop(wave)
        self._records.drop(wave)
        self.prefetcher.drop(wave)
        in_lanes = set(self._runs.of(self._jobs.all))
        for run in self._runs.drop(wave):
            run.ran([load for load in run.owed if (run, load) not in in_lanes])
            if run.complete:
                self._release(run)

    def check(self) -> None:
        """Raise `AssertionError` unless every load is in exactly one place and every copy has its slot."""
        self.cache.check()
        self._jobs.check()
        self._copies.check()
        runs = self._runs.all
        placed = [*self._runs.of(self._jobs.all), *self._copies.waiting]
        owed = {(run, load) for run in runs for load in run.owed}
        assert len(placed) == len(set(placed)), "a load is in two places"
        assert set(placed) == owed, "a load that is owed is in no place, or one that is not is"
        assert not any(run.complete and run.leased for run in runs), "a layer that is complete holds slots"
