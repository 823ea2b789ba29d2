"""A crossing for forwards on a GPU: one round trip a layer, everything else is queued behind it.

A layer's routing comes down in one pinned copy whose event is polled; its rows follow for the experts of the host.
Every visit has a row of its own in the layer's `visits` `[T·K, H]` on the GPU, zero until an expert has run: the
sum's order, and with it every bit of the result, depends on the routing alone.

What is to be told once a GPU has passed a point: asked for, never waited for.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from fiddler.gpu.device import Event, Gpu
from fiddler.lanes.experts import Ask, Routing, summed
from fiddler.scheduler.messages import LayerTook, Report
from fiddler.scheduler.routing import LayerWork, Load

Tell = Callable[[], Report | None]
"""Makes the report of a point that was passed, or none where all is said."""


@dataclass(slots=True)
class _Points:
    """Points of one stream, in its order: if one is not passed, none behind it is."""

    waiting: deque[tuple[Event, Tell]] = field(default_factory=deque)

    def passed(self) -> list[Tell]:
        found = []
        while self.waiting and self.waiting[0][0].done():
            found.append(self.waiting.popleft()[1])
        return found


class Watch:
    """Points of a GPU's streams that somebody wants to hear of."""

    def __init__(self) -> None:
        self._main, self._link, self._down = _Points(), _Points(), _Points()

    def main(self, event: Event, tell: Tell) -> None:
        """Tell once the main stream has passed `event`."""
        self._main.waiting.append((event, tell))

    def link(self, event: Event, tell: Tell) -> None:
        """Tell once the copies up to `event` have landed."""
        self._link.waiting.append((event, tell))

    def down(self, event: Event, tell: Tell) -> None:
        """Tell once what is on its way to the host up to `event` is there."""
        self._down.waiting.append((event, tell))

    def collect(self) -> list[Report]:
        """Return what is to be told now: of the main stream first, for what comes down from it comes later."""
        down = self._down.passed()  # asked first, or it could pass a point that the main stream was not seen to
        told = (tell() for tell in chain(self._main.passed(), self._link.passed(), down))
        return [report for report in told if report is not None]


@dataclass(slots=True, eq=False)
class GpuLayer:
    """A layer on its way."""

    ask: Ask
    ready: Event
    """On the main stream, behind the dense part that asked."""
    note: Tensor
    """The routing; see `noted`."""
    note_there: Tensor
    """The same on the host, pinned."""
    rows: Tensor
    """`[T, H]` on the host, pinned."""
    rows_there: Event
    visits: Tensor
    """`[T·K, H]` on the GPU."""
    work: LayerWork | None = None
    up: Event | None = None
    """Behind the latest results of the host's experts."""
    gone: bool = False
    """Whether nobody waits for it any more."""

    @property
    def top_k(self) -> int:
        """Experts a token visits."""
        return self.ask.index.shape[1]

    def positions(self, loads: Sequence[Load]) -> list[int]:
        """Return the rows of `visits` that loads write, in their order."""
        assert self.work is not None
        return [p for load in loads for p in self.work.order[load.start : load.stop]]


@dataclass(frozen=True, slots=True)
class Due:
    """The end of a wave's latest dense part."""

    began: Event | None
    """On the main stream; `None` where nobody marked it: at a wave's beginning."""
    ended: Event
    """On the main stream."""
    there: Event
    """When the host has what it asked for."""


def noted(ask: Ask) -> Tensor:
    """Return a routing as one float32 `[T, 2K + K']`: index, weights, and what is ahead.

    Numbers of experts are exact in float32 up to 2**24.
    """
    parts = (ask.index, ask.weights, ask.ahead)
    return torch.cat([part.to(torch.float32) for part in parts if part is not None], dim=1)


def blank_visits(ask: Ask) -> Tensor:
    """Return room for every visit, `[T·K, H]` zeros."""
    return ask.hidden.new_zeros(ask.index.numel(), ask.hidden.shape[1])


@dataclass(slots=True)
class GpuCrossing:
    """The layers on their way, and what each wave waits for."""

    gpu: Gpu
    watch: Watch
    due: dict[int, Due] = field(default_factory=dict)
    """By wave, of its latest dense part."""
    _layers: dict[tuple[int, int], GpuLayer] = field(default_factory=dict)
    _began: dict[int, Event] = field(default_factory=dict)

    def find(self, wave: int, layer: int) -> GpuLayer | None:
        """Return a layer that was not let go."""
        return self._layers.get((wave, layer))

    def announce(self, wave: int, ask: Ask) -> None:
        """Bring a layer's routing down, and its rows behind it."""
        gpu = self.gpu
        if ask.own is not None:
            _, note, visits = ask.own
        else:
            note, visits = gpu.launch(lambda: (noted(ask), blank_visits(ask)))
        ready = gpu.main.mark()
        gpu.down.follow(ready)
        note_there, there = self._down(note)
        rows, rows_there = self._down(ask.hidden)
        self._layers[wave, ask.layer] = GpuLayer(ask, ready, note, note_there, rows, rows_there, visits)
        self.due[wave] = Due(self._began.pop(wave, None), ready, there)

    def conclude(self, wave: int, results: Sequence[Tensor]) -> list[Tensor]:
        """Bring down what a wave's forwards have returned; it is there when their dense part is reported."""
        ready = self.gpu.main.mark()
        self.gpu.down.follow(ready)
        brought = [self._down(result) for result in results]
        there = brought[-1][1] if brought else self.gpu.down.mark()
        self.gpu.main.follow(there)  # whose memory may go to others from here on
        self.due[wave] = Due(self._began.pop(wave, None), ready, there)
        return [tensor for tensor, _ in brought]

    def routing(self, wave: int, layer: int) -> Routing:
        """Return who visits whom, as it came down."""
        found = self._layers[wave, layer]
        k, own = found.top_k, found.ask.own
        note = found.note_there if own is None else found.note_there[: own.n_rows]
        ahead = note[:, 2 * k :].to(torch.int64) if found.ask.ahead is not None else None
        return Routing(note[:, :k].to(torch.int64), note[:, k : 2 * k], ahead)

    def open(self, wave: int, work: LayerWork) -> None:
        """Let jobs of the layer begin."""
        self._layers[wave, work.layer].work = work

    def results(self, wave: int, layer: int, *, deferred: bool = False, failed: tuple[Load, ...] = ()) -> Tensor:
        """Queue the weighted sums behind all that the layer's jobs have queued; rows that failed were left zero."""
        found, gpu = self._layers[wave, layer], self.gpu
        if found.up is not None:
            gpu.main.follow(found.up)
        if not deferred:
            self._pass(wave, layer, found)
        if found.ask.own is not None:
            return found.visits
        assert found.work is not None
        if not found.work.deferred:
            return gpu.launch(lambda: summed(found.visits, found.ask.weights))
        loads = found.work.deferred if deferred else found.work.loads
        mask = gpu.pinned(*found.ask.weights.shape, dtype=torch.float32).zero_()
        mask.view(-1)[found.positions(loads)] = 1.0
        return gpu.launch(lambda: summed(found.visits, found.ask.weights * self._device(mask)))

    def let_go(self, wave: int, layer: int) -> None:
        """Forget a layer. Its memory may go to others: the main stream follows whoever still uses it."""
        found = self._layers.pop((wave, layer), None)
        if found is not None:
            found.gone = True
            for event in (found.rows_there, found.up):
                if event is not None:
                    self.gpu.main.follow(event)

    def end(self, wave: int) -> None:
        """Forget a wave."""
        self.due.pop(wave, None)
        self._began.pop(wave, None)

    def _pass(self, wave: int, layer: int, found: GpuLayer) -> None:
        """Mark where the layer's experts end and the next dense part begins, and have the time between told."""
        ended = self._began[wave] = self.gpu.main.mark()
        self.watch.main(ended, lambda: LayerTook(wave, layer, ended.since(found.ready)))

    def _down(self, tensor: Tensor) -> tuple[Tensor, Event]:
        """Queue a tensor's way to the host; returns where it will be, and when."""
        host = self.gpu.pinned(*tensor.shape, dtype=tensor.dtype)
        self.gpu.down.run(partial(host.copy_, tensor, non_blocking=True))
        return host, self.gpu.down.mark()

    def _device(self, host: Tensor) -> Tensor:
        return torch.empty_like(host, device=self.gpu.device).copy_(host, non_blocking=True)
