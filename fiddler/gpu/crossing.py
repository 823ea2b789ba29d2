"""The crossing of forwards on a GPU: one round trip a layer, everything else is queued behind it.

A layer's routing comes down in one pinned copy whose event is polled; its rows follow for the host's experts. Every
visit has a row of its own in the layer's `visits` `[T·K, H]` on the GPU, zero until an expert has run: the sum's
order, and with it every bit of the result, depends on the routing alone.

`Watch` holds the points of the GPU's streams that lanes want to hear of. They are polled.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import cast

import torch
from torch import Tensor

from fiddler.gpu.device import Event, Gpu
from fiddler.lanes.experts import Ask, Routing, summed
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import LayerTook, Report
from fiddler.scheduler.routing import LayerWork, Load

Tell = Callable[[], Report | None]
"""Makes the report of a point that was passed, or `None`."""


@dataclass(slots=True)
class _Points:
    """Points of one stream, in its order: if one is not passed, none behind it is."""

    waiting: deque[tuple[Event, Tell]] = field(default_factory=deque)
    n_awaited: int = 0
    """Number of points, from the first, that are awaited already."""

    def passed(self) -> list[Tell]:
        found = []
        while self.waiting and self.waiting[0][0].done():
            found.append(self.waiting.popleft()[1])
        self.n_awaited = max(0, self.n_awaited - len(found))
        return found

    def unawaited(self) -> list[Event]:
        """Return the points that are not awaited yet; they are from now on."""
        events = [event for event, _ in islice(self.waiting, self.n_awaited, None)]
        self.n_awaited = len(self.waiting)
        return events


class Watch:
    """Points of a GPU's streams to be reported."""

    def __init__(self) -> None:
        self._main, self._link, self._down = _Points(), _Points(), _Points()

    def main(self, event: Event, tell: Tell) -> None:
        """Report once the main stream has passed `event`."""
        self._main.waiting.append((event, tell))

    def link(self, event: Event, tell: Tell) -> None:
        """Report once the copies up to `event` have landed."""
        self._link.waiting.append((event, tell))

    def down(self, event: Event, tell: Tell) -> None:
        """Report once data on its way to the host, up to `event`, is there."""
        self._down.waiting.append((event, tell))

    def alone(self) -> Event | None:
        """Return the next point of the stream to the host; `None` where copies are under way as well."""
        return self._down.waiting[0][0] if self._down.waiting and not self._link.waiting else None

    def unawaited(self) -> tuple[list[Event], list[Event]]:
        """Return the points of the link, and of the way to the host, that are not awaited yet; now they are."""
        return self._link.unawaited(), self._down.unawaited()

    def collect(self) -> list[Report]:
        """Return the reports of passed points: the main stream's first, since data on the way down follows it."""
        down = self._down.passed()  # asked first, or it could pass a point that the main stream was not seen to
        told = (tell() for tell in chain(self._main.passed(), self._link.passed(), down))
        return [report for report in told if report is not None]


@dataclass(slots=True, eq=False)
class GpuLayer:
    """A layer in flight."""

    ask: Ask
    ready: Event
    """A point on the main stream, behind the dense part that asked for the layer."""
    note: Tensor
    """The routing; see `noted`."""
    note_there: Tensor
    """The routing on the host, pinned."""
    note_came: Event
    rows: Tensor
    """`[T, H]` on the host, pinned."""
    rows_there: Event
    visits: Tensor
    """`[T·K, H]` on the GPU."""
    work: LayerWork | None = None
    up: Event | None = None
    """A point behind the latest results of the host's experts."""
    gone: bool = False
    """Whether the layer was dropped."""

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
    """A point on the main stream; `None` where none was marked, at a wave's beginning."""
    ended: Event
    """A point on the main stream."""
    there: Event
    """A point when the host has the data it asked for."""


def noted(ask: Ask) -> Tensor:
    """Return a routing as one float32 `[T, 2K + K']`: index, weights, and look-ahead.

    Numbers of experts are exact in float32 up to 2**24.
    """
    parts = (ask.index, ask.weights, ask.ahead)
    return torch.cat([part.to(torch.float32) for part in parts if part is not None], dim=1)


def blank_visits(ask: Ask) -> Tensor:
    """Return room for every visit, `[T·K, H]` zeros."""
    return ask.hidden.new_zeros(ask.index.numel(), ask.hidden.shape[1])


@dataclass(slots=True)
class GpuCrossing:
    """One wave's way to its experts and back."""

    gpu: Gpu
    watch: Watch
    due: Due | None = None
    """The end of the latest dense part."""
    asked: GpuLayer | None = None
    """The layer that was announced and not opened."""
    _began: Event | None = None

    def announce(self, ask: Ask) -> None:
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
        self.asked = GpuLayer(ask, ready, note, note_there, there, rows, rows_there, visits)
        self._end_at(ready, there)

    def conclude(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Bring down the results of a wave's forwards; they are there when their dense part is reported."""
        ready = self.gpu.main.mark()
        self.gpu.down.follow(ready)
        brought = [self._down(result) for result in results]
        there = brought[-1][1] if brought else self.gpu.down.mark()
        self.gpu.main.follow(there)  # whose memory may go to others from here on
        self._end_at(ready, there)
        return [tensor for tensor, _ in brought]

    def _end_at(self, ready: Event, there: Event) -> None:
        self.due, self._began = Due(self._began, ready, there), None

    def routing(self) -> Routing:
        """Return the routing as it came down."""
        found = self.asked
        assert found is not None
        k, own = found.top_k, found.ask.own
        note = found.note_there if own is None else found.note_there[: own.n_rows]
        ahead = note[:, 2 * k :].to(torch.int64) if found.ask.ahead is not None else None
        return Routing(note[:, :k].to(torch.int64), note[:, k : 2 * k], ahead)

    def open(self, work: LayerWork) -> GpuLayer:
        """Let jobs of the layer begin."""
        found, self.asked = self.asked, None
        assert found is not None
        found.work = work
        return found

    def results(self, layer: Layer, *, deferred: bool = False, failed: Sequence[Load] = ()) -> Tensor:
        """Queue the weighted sums behind all that the layer's jobs have queued; rows that failed were left zero."""
        found, gpu = cast("GpuLayer", layer.tensors), self.gpu
        if found.up is not None:
            gpu.main.follow(found.up)
        if not deferred:
            self._pass(layer, found)
        work = layer.work
        if deferred or not work.deferred:
            self.let_go(layer)
        if found.ask.own is not None:
            return found.visits
        if not work.deferred:
            return gpu.launch(lambda: summed(found.visits, found.ask.weights))
        loads = work.deferred if deferred else work.loads
        mask = gpu.pinned(*found.ask.weights.shape, dtype=torch.float32).zero_()
        mask.view(-1)[found.positions(loads)] = 1.0
        return gpu.launch(lambda: summed(found.visits, found.ask.weights * self._device(mask)))

    def let_go(self, layer: Layer) -> None:
        """Release a layer. The main stream follows all users of its memory before that is used again."""
        found, layer.tensors = cast("GpuLayer", layer.tensors), None
        self._gone(found)

    def end(self) -> None:
        """Release a layer that was announced and not opened."""
        found, self.asked = self.asked, None
        if found is not None:
            self._gone(found)

    def _gone(self, found: GpuLayer) -> None:
        found.gone = True
        for event in (found.rows_there, found.up):
            if event is not None:
                self.gpu.main.follow(event)

    def _pass(self, layer: Layer, found: GpuLayer) -> None:
        """Mark where the layer's experts end and the next dense part begins, and report the time between."""
        ended = self._began = self.gpu.main.mark()
        self.watch.main(ended, lambda: LayerTook(layer, ended.since(found.ready)))

    def _down(self, tensor: Tensor) -> tuple[Tensor, Event]:
        """Queue a tensor's copy to the host; returns where it will be, and when."""
        host = self.gpu.pinned(*tensor.shape, dtype=tensor.dtype)
        self.gpu.down.run(partial(host.copy_, tensor, non_blocking=True))
        return host, self.gpu.down.mark()

    def _device(self, host: Tensor) -> Tensor:
        return torch.empty_like(host, device=self.gpu.device).copy_(host, non_blocking=True)
