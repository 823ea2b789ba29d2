"""The scheduler of a machine with only a CPU: there is nothing to decide, and deciding costs nothing."""

from collections import deque
from collections.abc import Mapping, Sequence

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cost.model import Correction, CostModel, LaneName
from fiddler.scheduler.layer import Came, Counters, Layer
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
    RunExperts,
    WaveDropped,
)
from fiddler.scheduler.plan import Planner, all_cpu
from fiddler.trace import Decision, Trace
from fiddler.types import PrefetchStatistics


class CpuOnly:
    """Sends each layer's loads, deferred ones too, to the CPU as one job; keeps what `Scheduler` promises."""

    def __init__(self, cache: ExpertCache, costs: CostModel, trace: Trace | None = None) -> None:
        self.cache = cache
        self.correction = Correction(costs)
        self.counters = Counters()
        self.planner: Planner = all_cpu
        self.recent: dict[int, deque[Came]] | None = None
        """Always empty: nothing predicts from it on a CPU."""
        self._trace = trace
        self._dead: dict[LaneName, BaseException] = {}
        self._n_jobs = 0
        self._jobs: dict[int, Layer] = {}

    def handle(self, event: Event, now_s: float) -> Sequence[Command]:
        """Handle an event at `now_s`, in seconds; return the commands."""
        match event:
            case LayerReady(layer):
                work, wave = layer.work, layer.wave
                layer.started_s = now_s
                layer.before, wave.latest = wave.latest, layer
                loads = (*work.loads, *work.deferred) if work.deferred else work.loads
                if self._dead or not loads:
                    return (self._done(layer, self._failed(layer), now_s),)
                self._n_jobs += 1
                self._jobs[self._n_jobs] = layer
                self.counters.n_cpu += len(loads)
                return (RunExperts(self._n_jobs, "cpu", layer, loads, (), 0.0),)
            case JobDone(job, _, failures):
                begun = self._jobs.pop(job, None)
                return (self._done(begun, failures, now_s),) if begun is not None else ()
            case LaneDied(lane, error):
                self._dead[lane] = error
                left, self._jobs = list(self._jobs.values()), {}
                return [self._done(layer, self._failed(layer), now_s) for layer in left]
            case WaveDropped(wave):
                wave.gone, wave.latest = True, None
                return ()
            case DenseQueued(wave):
                return (DenseDone(wave),)
            case CopyOrdered() | JobTook() | LayerTook():  # of a GPU, which there is none of
                return ()

    def preload(self, order: Sequence[Key] | None = None) -> list[CopyExpert]:
        """Return no copies: there are no slots."""
        return []

    @property
    def prefetched(self) -> PrefetchStatistics:
        """Empty statistics: nothing is copied ahead."""
        return PrefetchStatistics()

    @property
    def idle(self) -> bool:
        """Whether no lane has anything to do."""
        return not self._jobs

    @property
    def dead(self) -> Mapping[LaneName, BaseException]:
        """Lanes that are done without, and why."""
        return self._dead

    def check(self) -> None:
        """Raise `AssertionError` where a wave has two layers in the lane."""
        waves = [layer.wave for layer in self._jobs.values()]
        assert len(waves) == len(set(waves)), "a wave is in two places"

    def _failed(self, layer: Layer) -> Failures:
        error = self._dead.get("cpu")
        loads = (*layer.work.loads, *layer.work.deferred)
        return {load.expert: error for load in loads} if error is not None else {}

    def _done(self, layer: Layer, failures: Failures, now_s: float) -> Command:
        before, layer.before = layer.before, None
        late = before.late_failures if before is not None else {}
        if failures and layer.work.deferred:
            layer.late_failures.update(failures)
        self.counters.n_layers += 1
        if self._trace is not None:
            work, since_s = layer.work, layer.started_s
            n_rows, n_cpu, took_s = len(work.order), len(work.loads), now_s - since_s
            self._trace.decision(Decision(since_s, layer.wave.number, work.layer, n_rows, n_cpu, 0, 0, 0.0, took_s))
        return LayerDone(layer, failures, late)
