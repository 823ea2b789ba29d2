"""Drives waves through their layers: carries events to the scheduler and its commands to the lanes.

Knows neither tensors nor clocks: the same code runs a model on real lanes and a script in virtual time.
"""

from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Protocol

from fiddler.errors import EngineFailedError
from fiddler.lanes.laneset import LaneSet
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.messages import (
    Command,
    DenseDone,
    DenseQueued,
    Event,
    LayerDone,
    LayerReady,
    WaveDropped,
)


class Wave(Protocol):
    """Rows that travel through the model together."""

    n_rows: int
    n_context: int
    """Tokens of past its rows attend to, over all sequences."""

    def advance(self, wave: int) -> LayerReady | None:
        """Run the dense part up to the next layer's experts, as wave number `wave`; `None` at the end."""
        ...

    def take(self, done: LayerDone) -> None:
        """Take a layer's results, which are there now, except those of its failures."""
        ...

    def end(self, error: Exception | None) -> None:
        """Let go of everything; `error` is what stopped it early, if anything did."""
        ...


class Runner:
    """One machine's driver. Its methods belong to the engine's thread."""

    def __init__(self, scheduler: Scheduler, lanes: LaneSet) -> None:
        self.scheduler = scheduler
        self.lanes = lanes
        self._numbers = count()
        self._waves: dict[int, Wave] = {}
        self._in_head: set[int] = set()
        self._in_order = False
        self._passed: dict[int, int] = {}  # by wave of this run, the dense parts it has begun and ended
        self._held: set[int] = set()  # waves that wait for the one in front

    async def run(self, waves: Sequence[Wave], *, in_order: bool = False) -> None:
        """Run waves side by side to their ends. What a wave raises ends that wave alone.

        `in_order`: no wave begins a layer's dense part before the one in front of it has; its rows may attend to
        that one's.
        """
        self._report(self.lanes.drain())
        self._in_order = in_order
        try:
            for wave in waves:
                number = next(self._numbers)
                self._waves[number] = wave
                self._passed[number] = 0
                self._apply(self._go(number))
            while self._waves:
                self._report([await self.lanes.report()])
        finally:
            for number in list(self._waves):
                self._end(number, EngineFailedError("the step was given up"))
            self._passed.clear()
            self._held.clear()

    async def settle(self) -> None:
        """Wait until no lane has anything to do: a copy that nobody waits for may outlive its step."""
        while not self.scheduler.idle:
            self._report([await self.lanes.report()])

    def _report(self, events: Sequence[Event]) -> None:
        for event in events:
            self._apply(self.scheduler.handle(event, self.lanes.now_s()))

    def _apply(self, commands: Sequence[Command]) -> None:
        left = deque(commands)
        while left:
            match left.popleft():
                case LayerDone(wave) as done:
                    if wave in self._waves:
                        self._waves[wave].take(done)
                        left += self._go(wave)
                case DenseDone(wave):
                    if wave in self._waves:
                        left += self._route(wave)
                case job:
                    self.lanes.start(job)

    def _go(self, number: int) -> Sequence[Command]:
        """Begin a wave's next dense part, unless the wave in front has to go first."""
        if (
            self._in_order
            and self._passed.get(number - 1, -1) == self._passed[number]
            and number - 1 in self._waves
        ):
            self._held.add(number)
            return []
        if not self.lanes.timed_dense:
            return self._route(number)
        wave = self._waves[number]
        return self.scheduler.handle(DenseQueued(number, wave.n_rows, wave.n_context), self.lanes.now_s())

    def _route(self, number: int) -> Sequence[Command]:
        """Run a wave's dense part and hand the layer it stops at to the scheduler."""
        wave = self._waves[number]
        if number in self._in_head:
            self._end(number, None)
            return []
        try:
            ready = wave.advance(number)
        except Exception as error:
            return self._end(number, error)
        self._passed[number] += 1
        if ready is not None:
            return [*self.scheduler.handle(ready, self.lanes.now_s()), *self._free(number + 1)]
        if self.lanes.timed_dense:
            self._in_head.add(number)
            head = DenseQueued(number, wave.n_rows, 0, head=True)
            return [*self.scheduler.handle(head, self.lanes.now_s()), *self._free(number + 1)]
        return self._end(number, None)

    def _free(self, number: int) -> Sequence[Command]:
        """Let a wave that was held go on."""
        if number not in self._held:
            return []
        self._held.remove(number)
        return self._go(number)

    def _end(self, number: int, error: Exception | None) -> Sequence[Command]:
        self._in_head.discard(number)
        self._waves.pop(number).end(error)
        dropped = self.scheduler.handle(WaveDropped(number), self.lanes.now_s()) if error is not None else []
        return [*dropped, *self._free(number + 1)]
