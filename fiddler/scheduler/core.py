"""The scheduler: events in, commands out; no clock and no threads of its own.

Every load of a layer is in one place at a time: in a lane, waiting for its expert to land, or done. What fails
falls back to the CPU, which needs neither a slot nor a copy; what fails there fails for good.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import count

from fiddler.cache.cache import ExpertCache, Reservation
from fiddler.cost.correction import Correction
from fiddler.cost.lanes import LANES, LaneName, Lanes
from fiddler.cost.model import CostModel
from fiddler.scheduler.counters import Counters
from fiddler.scheduler.layer import LayerRun
from fiddler.scheduler.messages import (
    Command,
    CopyExpert,
    DenseDone,
    DenseQueued,
    Event,
    Failures,
    Job,
    JobDone,
    LaneDied,
    LayerDone,
    LayerReady,
    RunDense,
    RunExperts,
    WaveDropped,
)
from fiddler.scheduler.plan import Backlog, Candidate, Plan, Planner, descent
from fiddler.scheduler.routing import Load
from fiddler.trace import Decision, Trace

Key = tuple[int, int]


class Scheduler:
    """Decides where every load of every layer runs; owner of all that is in flight."""

    def __init__(
        self,
        cache: ExpertCache,
        costs: CostModel,
        *,
        planner: Planner = descent,
        promote: bool = True,
        trace: Trace | None = None,
    ) -> None:
        self.cache = cache
        self.correction = Correction(costs)
        self.counters = Counters()
        self.recent: defaultdict[int, deque[LayerReady]] = defaultdict(lambda: deque(maxlen=2))
        """By layer, the latest: one or two waves of a step."""
        self._planner = planner
        self._promote = promote
        self._trace = trace
        self._lanes = Lanes(costs.contention)
        self._dead: dict[LaneName, Exception] = {}
        self._ids = count()
        self._jobs: dict[int, Job] = {}
        self._runs: dict[int, LayerRun] = {}  # by wave, its latest layer
        self._orphans: list[LayerRun] = []  # their waves are gone, lanes still work for them
        self._copies: dict[int, Reservation] = {}
        self._waiting: dict[Key, list[tuple[LayerRun, Load]]] = {}  # until the expert has landed
        self._now_s = 0.0

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take note of what happened at `now_s`, seconds on a clock that never goes back; return what to do."""
        self._lanes.pass_by(now_s - self._now_s)
        self._now_s = now_s
        match event:
            case LayerReady():
                return [*self._begin(event), *self._promotion()]
            case JobDone():
                return [*self._done(event), *self._promotion()]
            case DenseQueued():
                return [self._dense(event)]
            case LaneDied():
                return list(self._bury(event))
            case WaveDropped(wave):
                return list(self._drop(wave))

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._jobs and not self._runs and not self._orphans

    def backlog(self) -> Backlog:
        """Return the work queued in each lane."""
        lanes = self._lanes
        return Backlog(lanes.backlog_s("cpu"), lanes.backlog_s("gpu"), lanes.demand_s())

    # A layer's way

    def _begin(self, event: LayerReady) -> Iterator[Command]:
        work = event.work
        self.recent[work.layer].append(event)
        rows = [(load.expert, load.n_rows) for load in (*work.loads, *work.deferred)]
        self.cache.observe(work.layer, rows, event.n_tokens, event.scores)
        before = self._runs.get(event.wave)
        run = LayerRun(event.wave, work, self._now_s, set(work.loads), set(work.deferred), before=before)
        self._runs[event.wave] = run
        self._lease(run)
        run.plan = self._plan(run, work.loads)
        yield from self._dispatch(run, run.plan)
        if work.deferred:
            yield from self._dispatch(run, self._plan(run, work.deferred))
        yield from self._settle(run)

    def _lease(self, run: LayerRun) -> None:
        """Keep the slots of a layer's experts while it runs, wherever they will run."""
        if not {"gpu"} & self._dead.keys():
            for load in (*run.work.loads, *run.work.deferred):
                self._pin(run, load.expert)

    def _pin(self, run: LayerRun, expert: int) -> None:
        if expert not in run.leased and self.cache.slot((run.layer, expert)) is not None:
            self.cache.lease((run.layer, expert))
            run.leased.append(expert)

    def _plan(self, run: LayerRun, loads: Sequence[Load]) -> Plan:
        candidates = [self._candidate(run, load) for load in loads]
        n_fetch = 0
        if not self._dead and self.cache.n_slots:
            n_fetch = self.cache.admissible([(run.layer, c.load.expert) for c in candidates if c.place == "miss"])
        return self._planner(run.layer, candidates, self.correction.costs, self.backlog(), n_fetch)

    def _candidate(self, run: LayerRun, load: Load) -> Candidate:
        key = (run.layer, load.expert)
        if load.expert in run.leased:
            return Candidate(load, "hit")
        copy = self.cache.loading(key)
        if copy is not None and "gpu" not in self._dead:
            job = next(job for job, reservation in self._copies.items() if reservation.key == key)
            return Candidate(load, "landing", ahead_s=self._lanes.ahead_s(job))
        return Candidate(load, "miss", score=self.cache.score(key))

    def _dispatch(self, run: LayerRun, plan: Plan) -> Iterator[Command]:
        ready = tuple(load for load in plan.gpu if load.expert in run.leased)
        landing = [load for load in plan.gpu if load.expert not in run.leased]
        fetches = [(load, self.cache.reserve((run.layer, load.expert))) for load in plan.fetch]
        refused = [load for load, reservation in fetches if reservation is None]
        self.counters.planned(hits=len(plan.gpu), cpu=len(plan.cpu) + len(refused), fetches=len(plan.fetch))
        if ready:
            yield self._run_gpu(run, ready)
        yield from self._run_cpu(run, (*plan.cpu, *refused))
        for load in landing:
            self._waiting.setdefault((run.layer, load.expert), []).append((run, load))
        for load, reservation in fetches:
            if reservation is not None:
                self._waiting[reservation.key] = [(run, load)]
                yield self._copy(reservation, urgent=True)

    def _settle(self, run: LayerRun) -> Iterator[Command]:
        """Let a layer's forward go on if it can, and let go of what nobody needs."""
        if run.complete:
            for expert in run.leased:
                self.cache.release((run.layer, expert))
            run.leased.clear()
        if run in self._orphans:
            if run.complete:
                self._orphans.remove(run)
            return
        latest = self._runs[run.wave]
        if latest.passable and not latest.reported:
            late = latest.before.failures if latest.before is not None else {}
            latest.reported, latest.before = True, None
            self._record(latest)
            yield LayerDone(latest.wave, latest.layer, latest.failures, late)
        if latest.reported and latest.complete:
            del self._runs[run.wave]

    def _record(self, run: LayerRun) -> None:
        plan = run.plan
        assert plan is not None
        measured_s = self._now_s - run.started_s
        self.counters.measured(plan.predicted_s, measured_s)
        if self._trace is not None:
            self._trace.decision(
                Decision(
                    at_s=run.started_s,
                    wave=run.wave,
                    layer=run.layer,
                    n_rows=len(run.work.order),
                    n_cpu=len(plan.cpu),
                    n_gpu=len(plan.gpu),
                    n_fetch=len(plan.fetch),
                    predicted_s=plan.predicted_s,
                    measured_s=measured_s,
                )
            )

    # Jobs

    def _run_gpu(self, run: LayerRun, loads: tuple[Load, ...]) -> Command:
        slots = tuple(self._slot((run.layer, load.expert)) for load in loads)
        predicted_s = self.correction.costs.gpu_s(run.layer, [load.n_rows for load in loads])
        job = RunExperts(next(self._ids), "gpu", run.wave, run.layer, loads, slots, predicted_s)
        return self._start(job)

    def _slot(self, key: Key) -> int:
        slot = self.cache.slot(key)
        assert slot is not None, "a load was to run from a slot its expert does not have"
        return slot

    def _run_cpu(self, run: LayerRun, loads: tuple[Load, ...]) -> Iterator[Command]:
        if not loads:
            return
        error = self._dead.get("cpu")
        if error is not None:
            run.failures.update((load.expert, error) for load in loads)
            run.drop(loads)
            return
        predicted_s = self.correction.costs.cpu_s(run.layer, [load.n_rows for load in loads])
        yield self._start(RunExperts(next(self._ids), "cpu", run.wave, run.layer, loads, (), predicted_s))

    def _copy(self, reservation: Reservation, *, urgent: bool) -> Command:
        layer, expert = reservation.key
        costs = self.correction.costs.experts[layer]
        job = CopyExpert(next(self._ids), layer, expert, reservation.slot, urgent, costs.copy_s)
        self._copies[job.job] = reservation
        self.counters.copied(costs.nbytes)
        return self._start(job)

    def _dense(self, event: DenseQueued) -> Command:
        dense = self.correction.costs.dense
        if event.head:
            predicted_s = dense.head(event.n_rows)
        else:
            predicted_s = dense.layer_s(event.n_rows, event.n_context) + self.correction.costs.host_s
        return self._start(RunDense(next(self._ids), event.wave, predicted_s))

    def _promotion(self) -> Iterator[Command]:
        """Copy a hot expert in while the link has nothing to do."""
        if self._promote and self.cache.n_slots and not self._dead and not self._lanes.queues["link"]:
            key = self.cache.promotion()
            reservation = self.cache.reserve(key, promotion=True) if key is not None else None
            if reservation is not None:
                self.counters.n_promotions += 1
                yield self._copy(reservation, urgent=False)

    def _start(self, job: Job) -> Job:
        self._jobs[job.job] = job
        urgent = job.urgent if isinstance(job, CopyExpert) else True
        self._lanes.put(job.lane, job.job, job.predicted_s, urgent=urgent)
        return job

    # What lanes report

    def _done(self, event: JobDone) -> Iterator[Command]:
        job = self._jobs.pop(event.job, None)
        if job is None:  # its lane was declared dead, and it was taken care of
            return
        queued = self._lanes.remove(job.lane, job.job)
        if queued is not None and not event.failures and not isinstance(job, RunDense):
            self.correction.report(job.lane, queued.work_s * queued.slowdown, event.took_s)
        match job:
            case CopyExpert():
                yield from self._landed(job, failed=bool(event.failures))
            case RunExperts():
                yield from self._ran(job, event.failures)
            case RunDense():
                yield DenseDone(job.wave)

    def _landed(self, job: CopyExpert, *, failed: bool) -> Iterator[Command]:
        reservation = self._copies.pop(job.job)
        (self.cache.failed if failed else self.cache.landed)(reservation)
        if failed:
            self.counters.n_fallbacks += 1
        for run, load in self._waiting.pop(reservation.key, []):
            if failed or "gpu" in self._dead:
                yield from self._run_cpu(run, (load,))
                yield from self._settle(run)
            else:
                self._pin(run, load.expert)
                yield self._run_gpu(run, (load,))

    def _ran(self, job: RunExperts, failures: Failures) -> Iterator[Command]:
        run = self._run_of(job)
        failed = tuple(load for load in job.loads if load.expert in failures)
        run.drop([load for load in job.loads if load.expert not in failures])
        if failed and job.lane == "gpu":
            self.counters.n_fallbacks += len(failed)
            yield from self._run_cpu(run, failed)
        else:
            run.failures.update((load.expert, failures[load.expert]) for load in failed)
            run.drop(failed)
        yield from self._settle(run)

    def _run_of(self, job: RunExperts) -> LayerRun:
        latest = self._runs.get(job.wave)
        known = [run for run in (latest, latest.before if latest else None, *self._orphans) if run is not None]
        return next(run for run in known if (run.wave, run.layer) == (job.wave, job.layer))

    def _bury(self, event: LaneDied) -> Iterator[Command]:
        """Do without a lane: what it had goes to the CPU, what the CPU had fails."""
        self._dead[event.lane] = event.error
        for job in [job for job in self._jobs.values() if job.lane == event.lane]:
            experts = [load.expert for load in job.loads] if isinstance(job, RunExperts) else [-1]
            yield from self._done(JobDone(job.job, 0.0, dict.fromkeys(experts, event.error)))

    def _drop(self, wave: int) -> Iterator[Command]:
        """Forget a wave; its loads that wait for a copy are let go, those in lanes run to their end."""
        latest = self._runs.pop(wave, None)
        runs = [run for run in (latest, latest.before if latest else None) if run is not None]
        self._orphans += runs
        for key, waiting in self._waiting.items():
            for run, load in waiting:
                if run in runs:
                    run.drop((load,))
            self._waiting[key] = [(run, load) for run, load in waiting if run not in runs]
        for run in runs:
            yield from self._settle(run)

    def check(self) -> None:
        """Raise `AssertionError` unless every load is in exactly one place and every copy has its slot."""
        self.cache.check()
        runs = {*self._runs.values(), *(r.before for r in self._runs.values() if r.before), *self._orphans}
        placed = [
            (self._run_of(j), load) for j in self._jobs.values() if isinstance(j, RunExperts) for load in j.loads
        ]
        placed += [pair for pairs in self._waiting.values() for pair in pairs]
        owed = [(run, load) for run in runs for load in (*run.pending, *run.late)]
        assert len(placed) == len(set(placed)), "a load is in two places"
        assert set(placed) == set(owed), "a load that is owed is in no place, or one that is not is"
        assert self._copies.keys() == {j.job for j in self._jobs.values() if isinstance(j, CopyExpert)}
        assert self._waiting.keys() <= {r.key for r in self._copies.values()}, "a load waits for no copy"
        queued = {q.job for lane in LANES for q in self._lanes.queues[lane]}
        assert queued == self._jobs.keys(), "the lanes' queues and the jobs differ"
