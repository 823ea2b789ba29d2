"""The scheduler: events in, commands out; no clock and no threads of its own.

Every load of a layer is in one place at a time: in a lane, waiting for its expert to land, or done. A load that
fails elsewhere falls back to the CPU, which needs neither a slot nor a copy; one that fails on the CPU fails for
good. If link or GPU are dead, loads that cannot run from a slot go to the CPU; if the CPU is dead, loads are
fetched where possible, and the rest fail.

Commands come in the order of need: a layer's CPU job first, then loads in slots, then copies. Only then does the
scheduler learn from the visit and choose copies that no layer waits for.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cache.slots import Reservation
from fiddler.config import EngineConfig
from fiddler.cost.lanes import Backlog
from fiddler.cost.model import Correction, CostModel, LaneName
from fiddler.scheduler.guesses import PAYS, PREFETCH, Nobody, Predictor, Rule, promotion
from fiddler.scheduler.jobs import Copies, Jobs, Waiting, undone
from fiddler.scheduler.layer import Came, Counters, Layer, Wave
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
    LayerDone,
    LayerReady,
    LayerTook,
    Reason,
    RunDense,
    RunExperts,
    WaveDropped,
)
from fiddler.scheduler.placing import Placing
from fiddler.scheduler.plan import PLANNERS, Plan, Planner, best_cut
from fiddler.scheduler.prefetch import Prefetcher
from fiddler.scheduler.routing import Load
from fiddler.trace import Trace
from fiddler.types import PrefetchStatistics


class Scheduler:
    """Decides where every load of every layer runs, and owns all jobs and copies in flight."""

    def __init__(
        self,
        cache: ExpertCache,
        costs: CostModel,
        *,
        planner: Planner = best_cut,
        promote: bool = True,
        ahead: tuple[Predictor, Rule] = (Nobody(), PAYS),
        trace: Trace | None = None,
    ) -> None:
        self.cache = cache
        self.correction = Correction(costs)
        self.counters = Counters(trace)
        self.recent: dict[int, deque[Came]] | None = None
        """The latest visits by layer, of one or two waves; kept only for `Waves`, which predicts from them."""
        self.planner = planner
        self._promote = promote
        self._jobs = Jobs(self.correction)
        self._waves: set[Wave] = set()
        """Waves whose latest layer is running or was passed, and that were not dropped."""
        self._orphans: set[Layer] = set()
        """Layers of dropped waves whose jobs are still in lanes."""
        self._copies = Copies(cache, self._jobs)
        self._placing = Placing(cache, self._jobs, self._copies)
        self.prefetcher = Prefetcher(*ahead, cache)
        self._now_s = 0.0

    def handle(self, event: Event, now_s: float) -> Iterable[Command]:
        """Handle an event at `now_s`, seconds on a clock that never goes back; return the commands.

        The commands must be consumed, all of them, before the next call: the generator yields a layer's first
        commands before it has worked out the last.
        """
        if now_s > self._now_s:
            self._jobs.lanes.pass_by(now_s - self._now_s)
            self._now_s = now_s
        match event:
            case LayerReady(layer):
                return self._begin(layer)
            case JobDone():
                return self._done(event)
            case DenseQueued(wave):  # without a GPU its time is all that is asked for
                return [DenseDone(wave) if "gpu" in self._jobs.dead else self._jobs.dense(event)]
            case CopyOrdered(job):
                return self._ordered(job)
            case LaneDied():
                return self._bury(event)
            case JobTook(lane, predicted_s, took_s):
                self.correction.report(lane, predicted_s, took_s)
            case LayerTook(layer, took_s):
                self.counters.took(layer, took_s)
            case WaveDropped(wave):
                self._drop(wave)
        return ()

    def preload(self, order: Sequence[Key] | None = None) -> list[CopyExpert]:
        """Return the copies that fill the free slots before anything runs: in this order, or by worth."""
        order = self.cache.best(self.cache.n_slots) if order is None else order
        return [self._copy(reservation, "promotion") for reservation in self.cache.fill(order)]

    @property
    def idle(self) -> bool:
        """Whether no wave is on its way and no lane has anything to do."""
        return not self._jobs and not self._waves and not self._orphans

    @property
    def prefetched(self) -> PrefetchStatistics:
        """Counts of copies made ahead."""
        return self.prefetcher.statistics()

    @property
    def dead(self) -> Mapping[LaneName, BaseException]:
        """Lanes that died, and the error of each."""
        return self._jobs.dead

    def backlog(self) -> Backlog:
        """Return the work queued in each lane."""
        return self._jobs.lanes.backlog()

    def _begin(self, layer: Layer) -> Iterator[Command]:
        wave, work = layer.wave, layer.work
        layer.started_s = self._now_s
        before = wave.latest
        if before is not None and (before.work.deferred or before.pending or before.late):
            layer.before = before
        wave.latest = layer
        self._waves.add(wave)
        if self.recent is not None:
            self.recent.setdefault(layer.index, deque(maxlen=2)).append((work, layer.n_tokens, layer.top_k))
        rows = work.rows
        self.prefetcher.come(layer, rows, self._now_s, self.correction.costs)
        if self.cache.policy.by_recency:
            layer.worth = {expert: self.cache.score((layer.index, expert)) for expert in rows}
        if "gpu" not in self._jobs.dead:  # wherever they will run: the layer's own fetches must not evict them
            layer.leased = self.cache.lease_ready(layer.index, rows)
        self.prefetcher.let_go()
        layer.plan = yield from self._dispatch(layer, work.loads, rows)
        if work.deferred:
            yield from self._dispatch(layer, work.deferred)
        if not self._jobs.lanes.link:
            yield from self._fill_link(layer)
        if not layer.pending:
            yield from self._settle(layer)

    def _dispatch(
        self, layer: Layer, loads: Sequence[Load], rows: Mapping[int, int] | None = None
    ) -> Generator[Command, None, Plan]:
        """Send loads to lanes; then, once nothing is more urgent, learn from the visit: its `rows` by expert."""
        plan = self._placing.plan(layer, loads, self.planner)
        slots: Mapping[Load, Reservation] = {}
        if plan.fetch:  # who may take a slot from whom depends on this visit
            self._observe(layer, rows)
            rows = None
            plan, slots = self._placing.reserved(layer, loads, plan)
        counters = self.counters
        counters.n_hits += len(plan.gpu)
        counters.n_cpu += len(plan.cpu)
        counters.n_fetches += len(plan.fetch)
        if plan.cpu:
            yield from self._run_cpu(layer, plan.cpu)
        if plan.gpu:
            leased = layer.leased
            ready = tuple([load for load in plan.gpu if load.expert in leased])
            if ready:
                yield self._run_gpu(layer, ready)
            if len(ready) < len(plan.gpu):
                for load in plan.gpu:
                    if load.expert not in leased and not self._copies.wait(layer, load):
                        yield self._run_gpu(layer, (load,))
        for load in plan.fetch:
            yield self._copy(slots[load], "demand", (layer, load))
        self._observe(layer, rows)
        return plan

    def _observe(self, layer: Layer, rows: Mapping[int, int] | None) -> None:
        if rows is not None:
            self.cache.observe(layer.index, list(rows.items()), layer.n_tokens, layer.scores)

    def _settle(self, layer: Layer) -> Sequence[Command]:
        """Report a layer that is done, and release the slots that it leased."""
        if not layer.pending and not layer.late:
            self._release(layer)
        wave = layer.wave
        latest = wave.latest
        if latest is None or latest.reported or wave.gone or latest.pending:
            return ()
        before = latest.before
        if before is not None and not before.complete:
            return ()
        latest.reported, latest.before = True, None
        self.counters.passed(latest, self._now_s)
        wave.passed_s = self._now_s
        return (LayerDone(latest, latest.failures, before.late_failures if before is not None else {}),)

    def _release(self, layer: Layer) -> None:
        if layer.leased:
            self.cache.release_all(layer.index, layer.leased)
            layer.leased = ()
        self._orphans.discard(layer)

    def _run_gpu(self, layer: Layer, loads: tuple[Load, ...]) -> Command:
        slots = self._copies.slots(layer.index, loads)
        return self._jobs.run("gpu", layer, loads, slots)

    def _run_cpu(self, layer: Layer, loads: tuple[Load, ...]) -> Sequence[Command]:
        if "cpu" not in self._jobs.dead:
            return (self._jobs.run("cpu", layer, loads),)
        for load in loads:
            layer.fail(load, self._jobs.dead["cpu"])
        return ()

    def _copy(self, reservation: Reservation, reason: Reason, *waiting: Waiting) -> CopyExpert:
        link = self._jobs.lanes.link
        if reason == "demand" and len(link) == 1 and self._copies.by_job[link[0].job].reason == "ahead":
            self.prefetcher.use.delay_s += link[0].left_s
        return self._copies.start(reservation, reason, *waiting)

    def _fill_link(self, layer: Layer | None = None) -> Sequence[Command]:
        """Use the idle link: copy an expert that a next layer may visit, or one that this layer misses often."""
        if not self.cache.n_slots or self._jobs.dead:
            return ()
        costs, backlog = self.correction.costs, self._jobs.lanes.backlog()
        reservation = self.prefetcher.choose(costs, backlog, self.planner)
        if reservation is not None:
            return (self._copy(reservation, "ahead"),)
        if self._promote and layer is not None and layer.plan is not None and layer.plan.cpu:
            missed = [(layer.index, load.expert) for load in layer.plan.cpu]
            reservation = promotion(self.cache, missed, costs, backlog.cpu_s, self.prefetcher.gap_s)
            if reservation is not None:
                self.counters.n_promotions += 1
                return (self._copy(reservation, "promotion"),)
        return ()

    def _done(self, event: JobDone) -> Sequence[Command]:
        ended = self._jobs.end(event.job)
        if ended is None:
            return ()
        job, predicted_s = ended
        if isinstance(job, RunDense):
            return (DenseDone(job.wave),)
        failures, took_s = event.failures, event.took_s
        if isinstance(job, CopyExpert):
            if took_s is not None and not failures:
                self.correction.report("link", predicted_s, took_s)
            commands = self._landed((job.layer, job.expert), failed=bool(failures))
        else:  # of a wave that is gone it may have returned without doing anything
            if took_s is not None and not failures and not job.layer.wave.gone:
                self.correction.report(job.lane, predicted_s, took_s)
            commands = self._ran(job, failures, unended=took_s is None)
        if job.lane != "gpu" and not self._jobs.lanes.link:
            return (*commands, *self._fill_link())
        return commands

    def _ordered(self, job: int) -> Sequence[Command]:
        """Give the GPU the loads that wait for a copy: the GPU keeps the order itself."""
        if "gpu" in self._jobs.dead:
            return ()
        return [self._run_gpu(layer, (load,)) for layer, load in self._copies.order(job)]

    def _landed(self, key: Key, *, failed: bool) -> Sequence[Command]:
        commands: list[Command] = []
        for layer, load in self._copies.end(key, self.prefetcher.landed, failed=failed):
            if failed or "gpu" in self._jobs.dead:
                self.counters.n_fallbacks += 1
                commands += self._run_cpu(layer, (load,))
                commands += self._settle(layer)
            else:
                if load.expert not in layer.leased:
                    layer.leased = [*layer.leased, *self.cache.lease_ready(layer.index, (load.expert,))]
                commands.append(self._run_gpu(layer, (load,)))
        return commands

    def _ran(self, job: RunExperts, failures: Failures, *, unended: bool) -> Sequence[Command]:
        layer = job.layer
        layer.unended |= unended
        again: Sequence[Command] = ()
        if not failures:
            layer.pending.difference_update(job.loads)
            if layer.late:
                layer.late.difference_update(job.loads)
        else:
            failed = tuple(load for load in job.loads if load.expert in failures)
            if job.lane == "gpu" and not layer.wave.gone:
                layer.ran([load for load in job.loads if load not in failed])
                self.counters.n_fallbacks += len(failed)
                again = self._run_cpu(layer, failed)
            else:
                for load in failed:
                    layer.fail(load, failures[load.expert])
                layer.ran(job.loads)
        if layer.pending:  # it is not complete, nor is its wave's latest layer if that is another
            return again
        return (*again, *self._settle(layer))

    def _bury(self, event: LaneDied) -> Sequence[Command]:
        """Retire a dead lane: its jobs go to the CPU; jobs of the CPU's lane fail."""
        self._jobs.dead[event.lane] = event.error
        commands: list[Command] = []
        for job in self._jobs.all:
            if job.lane == event.lane:
                commands += self._done(JobDone(job.job, 0.0, undone(job, event.error)))
        return commands

    def _drop(self, wave: Wave) -> None:
        """Forget a wave: its loads in lanes run to their end, the others are dropped."""
        wave.gone = True
        self._waves.discard(wave)
        self.prefetcher.drop(wave)
        latest, wave.latest = wave.latest, None
        if latest is None:
            return
        layers = [layer for layer in (latest, latest.before) if layer is not None]
        if any(not layer.complete for layer in layers):
            self._copies.drop(wave)
            in_lanes = {
                (job.layer, load) for job in self._jobs.all if isinstance(job, RunExperts) for load in job.loads
            }
            for layer in layers:
                layer.ran([load for load in layer.owed if (layer, load) not in in_lanes])
                if not layer.complete:
                    self._orphans.add(layer)
        for layer in layers:
            if layer.complete:
                self._release(layer)

    def check(self) -> None:
        """Raise `AssertionError` unless every load is in exactly one place and every copy has its slot."""
        self.cache.check()
        self._jobs.check()
        self._copies.check()
        layers = self.layers
        running = [job for job in self._jobs.all if isinstance(job, RunExperts)]
        placed = [*((job.layer, load) for job in running for load in job.loads), *self._copies.waiting]
        owed = {(layer, load) for layer in layers for load in layer.owed}
        assert len(placed) == len(set(placed)), "a load is in two places"
        assert set(placed) == owed, "a load that is owed is in no place, or one that is not is"
        assert not any(layer.complete and layer.leased for layer in layers), "a layer that is complete holds slots"

    @property
    def layers(self) -> list[Layer]:
        """Every layer on its way, or passed by a wave that has not gone on."""
        latest = [wave.latest for wave in self._waves if wave.latest is not None]
        return [*latest, *(layer.before for layer in latest if layer.before is not None), *self._orphans]


def scheduler_for(
    config: EngineConfig, cache: ExpertCache, costs: CostModel, trace: Trace | None = None
) -> Scheduler:
    """Return the scheduler of an engine with an accelerator."""
    ahead = PREFETCH[config.prefetch](cache)
    return Scheduler(
        cache, costs, planner=PLANNERS[config.planner], promote=config.promote, ahead=ahead, trace=trace
    )
