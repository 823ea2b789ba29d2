"""One layer of one wave on its way: what still has to run, and what it holds; and all of them together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fiddler.scheduler.messages import Job, LayerDone, RunExperts
from fiddler.scheduler.plan import Plan
from fiddler.scheduler.routing import LayerWork, Load
from fiddler.trace import Decision


@dataclass(slots=True, eq=False)
class LayerRun:
    """The state of a layer between its `LayerReady` and its last load; the scheduler is its only writer."""

    wave: int
    work: LayerWork
    started_s: float
    pending: set[Load] = field(init=False)
    """Immediate loads that have not run."""
    late: set[Load] = field(init=False)
    """Deferred loads that have not run; the next layer waits for them."""
    scores: Mapping[int, float] = field(default_factory=dict)
    """What the cache held its experts to be worth before this visit, where that is asked for."""
    leased: list[int] = field(default_factory=list)
    """Experts whose slots stay while the layer runs."""
    failures: dict[int, BaseException] = field(default_factory=dict)
    """Of immediate loads."""
    late_failures: dict[int, BaseException] = field(default_factory=dict)
    plan: Plan | None = None
    """Of the immediate loads."""
    before: "LayerRun | None" = None
    """The layer before, until this one is reported."""
    reported: bool = False
    """Whether its `LayerDone` was given."""
    unended: bool = False
    """Whether something of it was done before it had ended."""

    def __post_init__(self) -> None:
        self.pending = set(self.work.loads)
        self.late = set(self.work.deferred)

    @property
    def layer(self) -> int:
        """Which layer of the model."""
        return self.work.layer

    @property
    def owed(self) -> set[Load]:
        """Loads that have not run."""
        return self.pending | self.late

    @property
    def complete(self) -> bool:
        """Whether nothing of it runs any more."""
        return not self.pending and not self.late

    @property
    def passable(self) -> bool:
        """Whether the forward can go on: its loads have run, and the deferred ones of the layer before."""
        return not self.pending and (self.before is None or self.before.complete)

    def ran(self, loads: Iterable[Load]) -> None:
        """Take loads off the list: they have run, or nobody wants them any more."""
        self.pending.difference_update(loads)
        self.late.difference_update(loads)

    def fail(self, load: Load, error: BaseException) -> None:
        """Take a load off the list that will never run."""
        failures = self.failures if load in self.pending else self.late_failures
        failures[load.expert] = error
        self.ran([load])

    def report(self) -> LayerDone:
        """Return that the forward can go on; what the layer before had to tell is told with it."""
        late = self.before.late_failures if self.before is not None else {}
        self.reported, self.before = True, None
        return LayerDone(self.wave, self.layer, self.failures, late)

    def decision(self, plan: Plan, now_s: float) -> Decision:
        """Return how it was planned and how long it has taken."""
        return Decision(
            at_s=self.started_s,
            wave=self.wave,
            layer=self.layer,
            n_rows=len(self.work.order),
            n_cpu=len(plan.cpu),
            n_gpu=len(plan.gpu),
            n_fetch=len(plan.fetch),
            predicted_s=plan.predicted_s,
            measured_s=now_s - self.started_s,
        )


class LayerRuns:
    """Owner of every layer on its way: the latest of each wave, and those that outlive their wave."""

    def __init__(self) -> None:
        self._latest: dict[int, LayerRun] = {}
        self._orphans: list[LayerRun] = []  # their waves are gone, lanes still work for them

    def __bool__(self) -> bool:
        return bool(self._latest or self._orphans)

    def awaited(self, wave: int) -> bool:
        """Whether somebody waits for a wave."""
        return wave in self._latest

    @property
    def all(self) -> list[LayerRun]:
        """Every layer, each once."""
        latest = self._latest.values()
        return [*latest, *(run.before for run in latest if run.before is not None), *self._orphans]

    def begin(self, run: LayerRun) -> None:
        """Let a layer be its wave's latest."""
        run.before = self._latest.get(run.wave)
        self._latest[run.wave] = run

    def latest(self, wave: int) -> LayerRun | None:
        """Return a wave's latest layer; `None` if the wave is gone, or has not begun."""
        return self._latest.get(wave)

    def find(self, wave: int, layer: int) -> LayerRun:
        """Return the layer that a lane works for."""
        return next(run for run in self.all if (run.wave, run.layer) == (wave, layer))

    def of(self, jobs: Iterable[Job]) -> list[tuple[LayerRun, Load]]:
        """Return the loads that jobs run, each with its layer."""
        running = [job for job in jobs if isinstance(job, RunExperts)]
        return [(self.find(job.wave, job.layer), load) for job in running for load in job.loads]

    def drop(self, wave: int) -> Sequence[LayerRun]:
        """Let a wave be gone; returns what is left of its layers, to be forgotten once they are complete."""
        latest = self._latest.pop(wave, None)
        runs = [run for run in (latest, latest.before if latest else None) if run is not None]
        self._orphans += runs
        return runs

    def forget(self, run: LayerRun) -> None:
        """Let go of a complete layer whose wave is gone; nothing happens if the wave is not."""
        if run in self._orphans:
            self._orphans.remove(run)
