"""Drives waves through their layers: carries events to the scheduler and its commands to the lanes.

Knows neither tensors nor clocks: the same code runs a model on real lanes and a script in virtual time.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from fiddler.cache.policy import Key
from fiddler.cost.model import LaneName
from fiddler.errors import EngineFailedError
from fiddler.lanes.laneset import LaneSet
from fiddler.scheduler.cpu_only import CpuOnly
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.messages import (
    DenseDone,
    DenseQueued,
    Event,
    Job,
    JobDone,
    LaneDied,
    LayerDone,
    LayerReady,
    WaveDropped,
)
from fiddler.scheduler.waves import RowSpan, S, Waves, halves

if TYPE_CHECKING:
    from fiddler.scheduler.core import Scheduler


class DrivenWave(Wave, ABC):
    """A wave, with the methods that a runner calls."""

    n_rows: int
    n_context: int
    """Tokens of past its rows attend to, over all sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.front: DrivenWave | None = None
        """Wave that must begin each dense part before this one does; the runner sets this and the next two."""
        self.n_passed = 0
        """Number of dense parts that it has begun and ended."""
        self.held = False
        """Whether it waits for the wave in front."""

    @property
    @abstractmethod
    def at_end(self) -> bool:
        """Whether its last layer's experts were asked for: the output head comes next."""

    @property
    def due(self) -> object:
        """A handle by which the GPU's lane knows when the latest dense part has ended."""
        return None

    @abstractmethod
    def launch(self) -> None:
        """Run the dense part up to the next layer's experts, or let it run on a GPU."""

    @abstractmethod
    def advance(self) -> Layer | None:
        """Return the layer at which the dense part has ended; `None` at the end of the model."""

    @abstractmethod
    def take(self, done: LayerDone) -> None:
        """Take a layer's results, except those of its failures."""

    @abstractmethod
    def end(self, error: BaseException | None) -> None:
        """Release everything; `error` is the reason if the wave ended early."""


class Runner:
    """Drives the waves of one machine. Its methods belong to the engine's thread."""

    def __init__(self, scheduler: "Scheduler | CpuOnly", lanes: LaneSet) -> None:
        self.scheduler = scheduler
        self.lanes = lanes
        self._numbers = count()
        self._running: list[DrivenWave] = []
        self._in_lanes: dict[int, LaneName] = {}  # jobs that a report is to come for
        self._events: deque[Event] = deque()  # that the scheduler was not told yet

    def run(self, waves: Sequence[DrivenWave], *, in_order: bool = False) -> None:
        """Run waves side by side to their ends. An error of a wave ends that wave alone.

        `in_order`: no wave begins a layer's dense part before the one in front of it has; its rows may attend to
        that one's.
        """
        self._events += self.lanes.drain()
        front = None
        for wave in waves:
            wave.number, wave.front = next(self._numbers), front if in_order else None
            front = wave
        self._running += waves
        try:
            for wave in waves:
                self._go(wave)
            self._work()
            while self._running:
                if not self._in_lanes:  # an error is better than a wait without end
                    raise RuntimeError("waves wait for their experts and no lane has any of them")
                self._events += self.lanes.drain() or (self.lanes.report(),)
                self._work()
        finally:
            if self._running:
                self._give_up()

    def _give_up(self) -> None:
        """End every wave."""
        for wave in self._running:
            wave.front = None  # or the end of the wave in front would let it go on
        self._events = deque(e for e in self._events if not isinstance(e, LayerReady | DenseQueued))
        while self._running:
            self._end(self._running[0], EngineFailedError("the step was given up"))
        self._work()

    def preload(self, order: Sequence[Key] | None = None) -> None:
        """Fill the free slots, in this order or by the cache's scores, and wait until they are filled."""
        for job in self.scheduler.preload(order):
            self._start(job)
        self._work()
        self.settle()

    def settle(self) -> None:
        """Wait until all lanes are idle: a copy that no layer waits for may outlive its step."""
        while self._in_lanes:
            self._events += self.lanes.drain() or (self.lanes.report(),)
            self._work()

    def _work(self) -> None:
        """Pass events to the scheduler in order, and carry out its commands, until nothing is left to do now.

        A layer's first commands are carried out before its last are worked out; later events wait meanwhile.
        """
        events = self._events
        while events:
            event = events.popleft()
            match event:
                case JobDone(number):
                    self._in_lanes.pop(number, None)
                case LaneDied(lane):
                    left = [(number, other) for number, other in self._in_lanes.items() if other != lane]
                    self._in_lanes = dict(left)
            for command in self.scheduler.handle(event, self.lanes.now_s()):
                match command:
                    case LayerDone(layer):
                        self._go(layer.wave, command)
                    case DenseDone(wave):
                        self._route(wave)
                    case job:
                        self._start(job)

    def _start(self, job: Job) -> None:
        """Give a lane its job; a lane that raises is reported as dead."""
        self._in_lanes[job.job] = job.lane
        try:
            self.lanes.start(job)
        except BaseException as error:
            self._events.append(LaneDied(job.lane, error))

    def _go(self, wave: Any, done: LayerDone | None = None) -> None:
        """Give a wave its results and begin its next dense part, unless the wave in front has to go first."""
        if wave not in self._running:
            return
        try:
            if done is not None:
                wave.take(done)
            wave.held = wave.front is not None and wave.front.n_passed == wave.n_passed
            if wave.held:
                return
            wave.launch()
        except BaseException as error:
            self._end(wave, error)
            return
        if self.lanes.timed_dense:
            self._events.append(DenseQueued(wave, wave.n_rows, wave.n_context, head=wave.at_end, due=wave.due))
        else:
            self._route(wave)

    def _route(self, wave: Any) -> None:
        """Give the scheduler the layer at which a wave's dense part ended."""
        if wave not in self._running:
            return
        try:
            layer = wave.advance()
        except BaseException as error:
            self._end(wave, error)
            return
        wave.n_passed += 1
        if layer is None:
            self._end(wave, None)
            return
        self._events.append(LayerReady(layer))
        if len(self._running) > 1:
            self._free(wave)

    def _free(self, front: DrivenWave) -> None:
        """Let a wave go on that waited for the wave in front."""
        for wave in self._running:
            if wave.held and wave.front is front:
                self._go(wave)

    def _end(self, wave: DrivenWave, error: BaseException | None) -> None:
        self._running.remove(wave)
        wave.end(error)
        self._events.append(WaveDropped(wave))
        for other in self._running:
            if other.front is wave:
                other.front = None
                if other.held:
                    self._go(other)
                break


W = TypeVar("W", bound=DrivenWave)
Make = Callable[[Sequence[RowSpan[S]], int], W]


def run_step(
    runner: Runner, waves: Waves, spans: Sequence[RowSpan[S]], make: Make[S, W], *, cut: bool
) -> list[tuple[Sequence[RowSpan[S]], W]]:
    """Run spans to the end of the model; returns each wave, which has ended, with its spans.

    `make` takes the spans of a wave, and its number in the step. `cut` allows one span to be cut in two, its later
    rows in the second wave.
    """
    n_rows = n_context = 0
    for span in spans:
        n_rows += span.stop - span.start
        n_context += span.stop
    n_waves = waves.choose(n_rows, n_context)
    parts = halves(spans, cut=cut) if n_waves == 2 else [list(spans)]
    made = [make(part, number) for number, part in enumerate(parts)]
    started_s = runner.lanes.now_s()
    follows = len(parts) == 2 and parts[0][-1].request is parts[1][0].request
    runner.run(made, in_order=follows)
    waves.took(len(made), runner.lanes.now_s() - started_s)
    return list(zip(parts, made, strict=True))
