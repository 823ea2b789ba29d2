"""A wave of a real model: forwards that meet at each layer's experts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fiddler.cache.policy import Rows
from fiddler.lanes.experts import Ask, Crossing, Routing
from fiddler.models.lookahead import Lookahead
from fiddler.models.seam import ExpertsCall, Forward
from fiddler.scheduler.messages import Failures, LayerDone, LayerReady
from fiddler.scheduler.routing import LayerWork, defer, route
from fiddler.steps.graphs import Replay
from fiddler.steps.recorder import WaveRecord


@dataclass(frozen=True, slots=True)
class Experts:
    """How a model's experts are asked for: the same for all its waves."""

    crossing: Crossing
    n_experts: tuple[int, ...]
    """By layer."""
    n_deferred: int = 0
    """Visits of least weight per token that join one layer late."""
    lookahead: Lookahead | None = None
    """What asks the next layer's router early."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A layer whose experts were asked for."""

    layer: int
    top_k: int
    meeting: tuple[int, ...]
    """Which forwards wait at it."""
    n_rows: list[int]
    """Rows of each of them."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """The same, once it is known who visits whom."""

    asked: _Asked
    routed: LayerWork


class ModelWave:
    """One packed forward, or one forward per sequence where a model cannot pack them.

    Forwards that wait at one layer share its experts.
    """

    def __init__(
        self,
        forwards: Sequence[Forward | Replay],
        experts: Experts,
        *,
        n_rows: int,
        n_context: int,
        record: WaveRecord | None = None,
    ) -> None:
        self.n_rows = n_rows
        self.n_context = n_context
        self.record = record
        self.results: list[Any] = [None] * len(forwards)
        """What each forward returned, once the wave has ended; its latest call before."""
        self.error: BaseException | None = None
        """What ended the wave early."""
        self.failed: dict[tuple[int, int], BaseException] = {}
        """(forward, row) whose experts failed."""
        self._forwards = forwards
        self._experts = experts
        self._wave = -1
        self._asked: _Asked | None = None
        self._now: _Layer | None = None
        self._before: _Layer | None = None  # its deferred visits are not in yet
        self._outputs: Sequence[Tensor | None] = [None] * len(forwards)

    @property
    def at_end(self) -> bool:
        """Whether its last layer's experts were asked for: the output head comes next."""
        return self._now is not None and self._now.routed.layer + 1 == len(self._experts.n_experts)

    def launch(self, wave: int) -> None:
        """Run forwards to their next experts call, and announce the rows of those at the lowest layer."""
        self._wave, self._asked = wave, None
        meeting = self._resume()
        if not meeting:
            self.results = self._experts.crossing.conclude(wave, self.results)
            return
        calls = [self.results[i] for i in meeting]
        ask = calls[0] if isinstance(calls[0], Ask) else self._ask(_joined(calls))
        self._experts.crossing.announce(wave, ask)
        self._asked = _Asked(ask.layer, ask.index.shape[1], meeting, [c.hidden.shape[0] for c in calls])

    def _ask(self, call: ExpertsCall) -> Ask:
        lookahead = self._experts.lookahead
        return Ask(*call, lookahead.expects(call.layer, call.hidden) if lookahead is not None else None)

    def advance(self) -> LayerReady | None:
        """Take in the rows of the layer that was announced; `None` where the forwards have ended."""
        asked, crossing = self._asked, self._experts.crossing
        if asked is None:
            return None
        routing = crossing.routing(self._wave, asked.layer)
        self._before = self._now if self._now is not None and self._now.routed.deferred else None
        self._now = now = _Layer(asked, self._route(asked, routing))
        crossing.open(self._wave, now.routed)
        if self.record is not None:
            self.record.visit(asked.layer, routing.index, routing.weights, asked.meeting)
        ahead = self._look_ahead(asked, routing.ahead)
        return LayerReady(self._wave, now.routed, routing.index.shape[0], asked.top_k, ahead=ahead)

    def _look_ahead(self, asked: _Asked, index: Tensor | None) -> Rows:
        """Return which experts of the next layer are expected, with the rows of each; likeliest first."""
        layer = asked.layer + 1
        if index is None:
            return ()
        if self.record is not None:
            self.record.expect(layer, index, asked.meeting)
        n_experts = self._experts.n_experts[layer]
        ranked = index.t().flatten().tolist()  # routers name the likeliest first, and ties keep this order
        return tuple(Counter(expert for expert in ranked if 0 <= expert < n_experts).most_common())

    def _resume(self) -> tuple[int, ...]:
        """Let forwards have their outputs; return those that then wait at the lowest layer."""
        meeting = self._now.asked.meeting if self._now is not None else tuple(range(len(self._forwards)))
        for i, output in zip(meeting, self._outputs, strict=True):
            self.results[i] = self._forwards[i].send(output)
        waiting = [i for i, forward in enumerate(self._forwards) if not forward.dead]
        if len(waiting) <= 1:
            return tuple(waiting)
        layer = min(self.results[i].layer for i in waiting)
        return tuple(i for i in waiting if self.results[i].layer == layer)

    def _route(self, asked: _Asked, routing: Routing) -> LayerWork:
        n_experts = self._experts.n_experts
        weights = routing.weights.flatten().tolist()
        routed = route(asked.layer, routing.index.flatten().tolist(), n_experts[asked.layer], weights)
        if self._experts.n_deferred and asked.layer + 1 < len(n_experts):
            return defer(routed, weights, asked.top_k, self._experts.n_deferred)
        return routed

    def take(self, done: LayerDone) -> None:
        """Combine a layer's results and the deferred ones of the layer before; failed rows count as zero."""
        now, before, crossing = self._now, self._before, self._experts.crossing
        assert now is not None
        total = self._combined(now, done.failures, deferred=False)
        if before is not None:
            total = total + self._combined(before, done.late_failures, deferred=True)
            crossing.let_go(self._wave, before.routed.layer)
        if not now.routed.deferred:
            crossing.let_go(self._wave, now.routed.layer)
        n_rows = now.asked.n_rows
        self._outputs = total.split(n_rows) if len(n_rows) > 1 else [total]

    def _combined(self, layer: _Layer, failures: Failures, *, deferred: bool) -> Tensor:
        routed, asked = layer.routed, layer.asked
        loads = routed.deferred if deferred else routed.loads
        failed = tuple(load for load in loads if load.expert in failures)
        for load in failed:
            for position in routed.order[load.start : load.stop]:
                self.failed[self._row(asked, position // asked.top_k)] = failures[load.expert]
        return self._experts.crossing.results(self._wave, routed.layer, deferred=deferred, failed=failed)

    def _row(self, asked: _Asked, token: int) -> tuple[int, int]:
        """Return the forward, and its row, that a token of a joined call belongs to."""
        for i, n_rows in zip(asked.meeting, asked.n_rows, strict=True):
            if token < n_rows:
                return i, token
            token -= n_rows
        raise IndexError(f"the layer has no row {token}")

    def end(self, error: BaseException | None) -> None:
        """Unwind what did not end by itself and let go of all rows."""
        self.error = error
        layers = [self._asked, *(layer.asked for layer in (self._now, self._before) if layer is not None)]
        for asked in layers:
            if asked is not None:
                self._experts.crossing.let_go(self._wave, asked.layer)
        self._experts.crossing.end(self._wave)
        for forward in self._forwards:
            forward.close()


def _joined(calls: Sequence[ExpertsCall]) -> ExpertsCall:
    """Return calls of one layer as one, their rows one after the other."""
    if len(calls) == 1:
        return calls[0]
    hidden, index, weights = (torch.cat([getattr(c, name) for c in calls]) for name in ExpertsCall._fields[1:])
    return ExpertsCall(calls[0].layer, hidden, index, weights)
