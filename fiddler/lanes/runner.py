"""Drives waves through their layers: carries events to the scheduler and its commands to the lanes.

Knows neither tensors nor clocks: the same code runs a model on real lanes and a script in virtual time.

A step as one wave or two: the same for a model's rows and for a script's.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol, TypeVar

from fiddler.cache.policy import Key
from fiddler.cost.lanes import LaneName
from fiddler.errors import EngineFailedError
from fiddler.lanes.laneset import LaneSet
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.cpu_only import CpuOnly
from fiddler.scheduler.messages import (
    Command,
    DenseDone,
    DenseQueued,
    Event,
    Job,
    JobDone,
    LaneDied,
    LayerDone,
    LayerReady,
    Report,
    WaveDropped,
)
from fiddler.scheduler.rows import S, Span, halves
from fiddler.scheduler.waves import Waves


class Wave(Protocol):
    """Rows that travel through the model together."""

    n_rows: int
    n_context: int
    """Tokens of past its rows attend to, over all sequences."""

    @property
    def at_end(self) -> bool:
        """Whether its last layer's experts were asked for: the output head comes next."""
        ...

    def launch(self, wave: int) -> None:
        """Run the dense part up to the next layer's experts, as wave number `wave`, or let it run on a GPU."""
        ...

    def advance(self) -> LayerReady | None:
        """Take in the layer that the dense part ended in, which is computed by now; `None` at the end."""
        ...

    def take(self, done: LayerDone) -> None:
        """Take a layer's results, which are there now, except those of its failures."""
        ...

    def end(self, error: BaseException | None) -> None:
        """Let go of everything; `error` is what stopped it early, if anything did."""
        ...


class Runner:
    """One machine's driver. Its methods belong to the engine's thread."""

    def __init__(self, scheduler: Scheduler | CpuOnly, lanes: LaneSet) -> None:
        self.scheduler = scheduler
        self.lanes = lanes
        self._numbers = count()
        self._waves: dict[int, Wave] = {}
        self._in_lanes: dict[int, LaneName] = {}  # jobs that a report is to come for
        self._in_order = False
        self._passed: dict[int, int] = {}  # by wave of this run, the dense parts it has begun and ended
        self._held: set[int] = set()  # waves that wait for the one in front

    async def run(self, waves: Sequence[Wave], *, in_order: bool = False) -> None:
        """Run waves side by side to their ends. What a wave raises ends that wave alone.

        `in_order`: no wave begins a layer's dense part before the one in front of it has; its rows may attend to
        that one's.
        """
        self._take(self.lanes.drain())
        self._in_order = in_order
        numbered = {next(self._numbers): wave for wave in waves}
        self._waves.update(numbered)
        self._passed = dict.fromkeys(numbered, 0)
        try:
            for number in numbered:
                self._apply(self._go(number))
            while self._waves:
                if not self._in_lanes:  # an error is better than a wait without end
                    raise RuntimeError("waves wait for their experts and no lane has any of them")
                self._take([await self.lanes.report(), *self.lanes.drain()])
        finally:
            self._held.clear()  # or the end of the wave in front would let them go on
            for number in list(self._waves):
                self._end(number, EngineFailedError("the step was given up"))

    async def preload(self, order: Sequence[Key] | None = None) -> None:
        """Fill the free slots, and wait until they are filled; in this order, or by what the cache knows."""
        self._apply(self.scheduler.preload(order))
        await self.settle()

    async def settle(self) -> None:
        """Wait until no lane has anything to do: a copy that nobody waits for may outlive its step."""
        while self._in_lanes:
            self._take([await self.lanes.report(), *self.lanes.drain()])

    def _take(self, reports: Sequence[Report]) -> None:
        for report in reports:
            self._apply(self._tell(report))

    def _tell(self, event: Event) -> Sequence[Command]:
        match event:
            case JobDone(job):
                self._in_lanes.pop(job, None)
            case LaneDied(lane):
                self._in_lanes = {job: other for job, other in self._in_lanes.items() if other != lane}
        return self.scheduler.handle(event, self.lanes.now_s())

    def _apply(self, commands: Sequence[Command]) -> None:
        left = deque(commands)
        while left:
            match left.popleft():
                case LayerDone(wave) as done:
                    left += self._pass(wave, done)
                case DenseDone(wave):
                    left += self._route(wave)
                case job:
                    left += self._start(job)

    def _start(self, job: Job) -> Sequence[Command]:
        """Give a lane its job; a lane that cannot take it is as good as dead."""
        try:
            self.lanes.start(job)
        except BaseException as error:
            return self._tell(LaneDied(job.lane, error))
        self._in_lanes[job.job] = job.lane
        return []

    def _pass(self, number: int, done: LayerDone) -> Sequence[Command]:
        """Give a wave its layer's results and let it go on."""
        if number not in self._waves:
            return []
        try:
            self._waves[number].take(done)
        except BaseException as error:
            return self._end(number, error)
        return self._go(number)

    def _go(self, number: int) -> Sequence[Command]:
        """Begin a wave's next dense part, unless the wave in front has to go first."""
        if (
            self._in_order
            and self._passed.get(number - 1, -1) == self._passed[number]
            and number - 1 in self._waves
        ):
            self._held.add(number)
            return []
        wave = self._waves[number]
        try:
            wave.launch(number)
        except BaseException as error:
            return self._end(number, error)
        if not self.lanes.timed_dense:
            return self._route(number)
        return self._tell(DenseQueued(number, wave.n_rows, wave.n_context, head=wave.at_end))

    def _route(self, number: int) -> Sequence[Command]:
        """Hand the layer that a wave's dense part ended in to the scheduler."""
        if number not in self._waves:
            return []
        try:
            ready = self._waves[number].advance()
        except BaseException as error:
            return self._end(number, error)
        self._passed[number] += 1
        if ready is None:
            return self._end(number, None)
        return [*self._tell(ready), *self._free(number + 1)]

    def _free(self, number: int) -> Sequence[Command]:
        """Let a wave that was held go on."""
        if number not in self._held:
            return []
        self._held.remove(number)
        return self._go(number)

    def _end(self, number: int, error: BaseException | None) -> Sequence[Command]:
        self._waves.pop(number).end(error)
        return [*self._tell(WaveDropped(number)), *self._free(number + 1)]


W = TypeVar("W", bound=Wave)
Make = Callable[[Sequence[Span[S]], int], W]


async def run_step(
    runner: Runner, waves: Waves, spans: Sequence[Span[S]], make: Make[S, W], *, cut: bool
) -> list[tuple[Sequence[Span[S]], W]]:
    """Run spans to the end of the model; returns each wave, which has ended, with its spans.

    `make` takes the spans of a wave, and its number in the step. `cut` allows one span to be cut in two, its later
    rows in the second wave.
    """
    n_waves = waves.choose(sum(s.n_rows for s in spans), sum(s.stop for s in spans))
    parts = halves(spans, cut=cut) if n_waves == 2 else [list(spans)]
    made = [make(part, number) for number, part in enumerate(parts)]
    started_s = runner.lanes.now_s()
    follows = len(parts) == 2 and parts[0][-1].request is parts[1][0].request
    await runner.run(made, in_order=follows)
    waves.took(len(made), runner.lanes.now_s() - started_s)
    return list(zip(parts, made, strict=True))
