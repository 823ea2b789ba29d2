"""The scheduler of a machine with nothing but a CPU: nothing is decided, so nothing is paid for deciding."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cost.correction import Correction
from fiddler.cost.lanes import LaneName
from fiddler.cost.model import CostModel
from fiddler.scheduler.messages import (
    Command,
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
from fiddler.scheduler.statistics import Counters
from fiddler.trace import Decision, Trace
from fiddler.types import PrefetchStatistics


class CpuOnly:
    """Sends each layer's loads, deferred ones too, to the CPU as one job; keeps what `Scheduler` promises."""

    def __init__(self, cache: ExpertCache, costs: CostModel, trace: Trace | None = None) -> None:
        self.cache = cache
        self.correction = Correction(costs)
        self.counters = Counters()
        self.planner: Planner = all_cpu
        self.recent: defaultdict[int, deque[LayerReady]] = defaultdict(deque)
        """Empty: nothing is predicted from it here."""
        self._trace = trace
        self._now_s = 0.0
        self._dead: dict[LaneName, BaseException] = {}
        self._n_jobs = 0
        self._jobs: dict[int, tuple[LayerReady, float]] = {}  # with when they came
        self._late: dict[int, Failures] = {}  # by wave, of the latest layer's deferred loads

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take note of what happened at `now_s`, in seconds; return what to do."""
        self._now_s = now_s
        match event:
            case LayerReady():
                return [self._begin(event)]
            case JobDone(job):
                begun = self._jobs.pop(job, None)
                return [self._done(*begun, event.failures)] if begun is not None else []
            case LaneDied(lane, error):
                self._dead[lane] = error
                left, self._jobs = list(self._jobs.values()), {}
                return [self._done(ready, since_s, self._failed(ready)) for ready, since_s in left]
            case WaveDropped(wave):
                self._late.pop(wave, None)
                return []
            case DenseQueued(wave):
                return [DenseDone(wave)]
            case CopyOrdered() | JobTook() | LayerTook():  # of a GPU, which there is none of
                return []

    def preload(self, order: Sequence[Key] | None = None) -> list[Command]:
        """Return nothing: there is no slot."""
        return []

    @property
    def prefetched(self) -> PrefetchStatistics:
        """Nothing."""
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
        waves = [ready.wave for ready, _ in self._jobs.values()]
        assert len(waves) == len(set(waves)), "a wave is in two places"

    def _begin(self, ready: LayerReady) -> Command:
        loads = (*ready.work.loads, *ready.work.deferred)
        if self._dead or not loads:
            return self._done(ready, self._now_s, self._failed(ready))
        self._n_jobs += 1
        self._jobs[self._n_jobs] = ready, self._now_s
        self.counters.n_cpu += len(loads)
        return RunExperts(self._n_jobs, "cpu", ready.wave, ready.work.layer, loads, (), 0.0)

    def _failed(self, ready: LayerReady) -> Failures:
        error = self._dead.get("cpu")
        loads = (*ready.work.loads, *ready.work.deferred)
        return {load.expert: error for load in loads} if error is not None else {}

    def _done(self, ready: LayerReady, since_s: float, failures: Failures) -> Command:
        late = self._late.pop(ready.wave, {})
        if ready.work.deferred:
            self._late[ready.wave] = failures
        self.counters.n_layers += 1
        if self._trace is not None:
            work = ready.work
            took_s = self._now_s - since_s
            self._trace.decision(
                Decision(since_s, ready.wave, work.layer, len(work.order), len(work.loads), 0, 0, 0.0, took_s)
            )
        return LayerDone(ready.wave, ready.work.layer, failures, late)
