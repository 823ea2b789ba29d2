"""A wave of a real model: forwards that meet at each layer's experts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fiddler.cache.policy import Rows
from fiddler.lanes.experts import Ask, Crossing
from fiddler.lanes.runner import DrivenWave
from fiddler.models.seam import ExpertsCall, Forward
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import Failures, LayerDone
from fiddler.scheduler.routing import Load, defer, route
from fiddler.steps.recorder import WaveRecord

if TYPE_CHECKING:
    from fiddler.models.lookahead import Lookahead
    from fiddler.steps.graphs import Replay


@dataclass(frozen=True, slots=True)
class Experts:
    """How a model's experts are reached: the same for all its waves."""

    crossing: Callable[[], Crossing]
    """Makes a wave's own crossing."""
    n_experts: tuple[int, ...]
    """Number of experts by layer."""
    n_deferred: int = 0
    """Visits of least weight per token that join one layer late."""
    lookahead: "Lookahead | None" = None
    """Asks the next layer's router early."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A layer whose experts were asked for."""

    layer: int
    top_k: int
    meeting: tuple[int, ...]
    """Forwards that wait at it."""
    n_rows: list[int]
    """Rows of each of these forwards."""


class ModelWave(DrivenWave):
    """One packed forward, or one forward per sequence where a model cannot pack them.

    Forwards that wait at one layer share its experts.
    """

    def __init__(
        self,
        forwards: "Sequence[Forward | Replay]",
        experts: Experts,
        *,
        n_rows: int,
        n_context: int,
        record: WaveRecord | None = None,
    ) -> None:
        super().__init__()
        self.n_rows = n_rows
        self.n_context = n_context
        self.record = record
        self.results: list[Any] = [None] * len(forwards)
        """Each forward's return value, once the wave has ended; its latest call before."""
        self.error: BaseException | None = None
        """The error that ended the wave early."""
        self.failed: dict[tuple[int, int], BaseException] = {}
        """Errors by (forward, row) whose experts failed."""
        self._forwards = forwards
        self._experts = experts
        self._crossing = experts.crossing()
        self._asked: _Asked | None = None  # the latest, and what was made of it
        self._now: Layer | None = None
        self._before: tuple[_Asked, Layer] | None = None  # its deferred visits are not in yet
        self._meeting = tuple(range(len(forwards)))  # forwards that go on with `_outputs`
        self._outputs: Sequence[Tensor | None] = [None] * len(forwards)

    @property
    def at_end(self) -> bool:
        """Whether its last layer's experts were asked for: the output head comes next."""
        return self._now is not None and self._now.index + 1 == len(self._experts.n_experts)

    @property
    def due(self) -> object:
        """A handle by which the GPU's lane knows when the latest dense part has ended."""
        return self._crossing.due

    def launch(self) -> None:
        """Run forwards to their next experts call, and announce the rows of those at the lowest layer."""
        if self._asked is not None and self._now is not None and self._now.work.deferred:
            self._before = self._asked, self._now
        self._asked = None
        meeting: tuple[int, ...]
        call: Any  # an `ExpertsCall`, or an `Ask` that was recorded
        if len(self._forwards) == 1:
            forward = self._forwards[0]
            call = self.results[0] = forward.send(self._outputs[0])
            meeting, n_rows = (() if forward.dead else (0,)), None
        else:
            meeting = self._resume()
            call, n_rows = _joined([self.results[i] for i in meeting])
        self._meeting = meeting
        if not meeting:
            self.results = self._crossing.conclude(self.results)
            return
        if not isinstance(call, Ask):
            index, hidden, visited, weights = call
            lookahead = self._experts.lookahead
            ahead = lookahead.expects(index, hidden) if lookahead is not None else None
            call = Ask(index, hidden, visited, weights, ahead)
        self._crossing.announce(call)
        self._asked = _Asked(call.layer, call.index.shape[1], meeting, n_rows or [call.hidden.shape[0]])

    def advance(self) -> Layer | None:
        """Return the announced layer, with its rows and routing; `None` where the forwards have ended."""
        asked, crossing = self._asked, self._crossing
        if asked is None:
            return None
        routing = crossing.routing()
        weights, (n_tokens, top_k) = routing.weights.flatten().tolist(), routing.index.shape
        n_experts, index = self._experts.n_experts, asked.layer
        work = route(index, routing.index.flatten().tolist(), n_experts[index], weights, n_tokens=n_tokens)
        if self._experts.n_deferred and index + 1 < len(n_experts):
            work = defer(work, weights, top_k, self._experts.n_deferred)
        if self.record is not None:
            self.record.visit(asked.layer, routing.index, routing.weights, asked.meeting)
        ahead = self._look_ahead(asked, routing.ahead) if routing.ahead is not None else ()
        self._now = Layer(self, work, n_tokens, top_k, ahead=ahead, tensors=crossing.open(work))
        return self._now

    def _look_ahead(self, asked: _Asked, index: Tensor) -> Rows:
        """Return which experts of the next layer are expected, with the rows of each; likeliest first."""
        layer = asked.layer + 1
        if self.record is not None:
            self.record.expect(layer, index, asked.meeting)
        n_experts = self._experts.n_experts[layer]
        ranked = index.t().flatten().tolist()  # routers name the likeliest first, and ties keep this order
        rows: dict[int, int] = {}
        for expert in ranked:
            if 0 <= expert < n_experts:
                rows[expert] = rows.get(expert, 0) + 1
        return tuple(rows.items()) if len(index) == 1 else tuple(Counter(rows).most_common())

    def _resume(self) -> tuple[int, ...]:
        """Resume forwards with their outputs; returns those that then wait at the lowest layer."""
        for i, output in zip(self._meeting, self._outputs, strict=True):
            self.results[i] = self._forwards[i].send(output)
        waiting = [i for i, forward in enumerate(self._forwards) if not forward.dead]
        layer = min((self.results[i].layer for i in waiting), default=None)
        return tuple(i for i in waiting if self.results[i].layer == layer)

    def take(self, done: LayerDone) -> None:
        """Combine a layer's results and the deferred ones of the layer before; failed rows count as zero."""
        asked, now, crossing = self._asked, self._now, self._crossing
        assert asked is not None
        assert now is not None
        if done.failures:
            total = self._combined(asked, now, done.failures, deferred=False)
        else:
            total = crossing.results(now)
        if self._before is not None:
            total = total + self._combined(*self._before, done.late_failures, deferred=True)
            self._before = None
        self._outputs = total.split(asked.n_rows) if len(asked.n_rows) > 1 else [total]

    def _combined(self, asked: _Asked, layer: Layer, failures: Failures, *, deferred: bool) -> Tensor:
        failed: Sequence[Load] = ()
        if failures:
            work = layer.work
            failed = [load for load in (work.deferred if deferred else work.loads) if load.expert in failures]
            for load in failed:
                for position in work.order[load.start : load.stop]:
                    self.failed[self._row(asked, position // asked.top_k)] = failures[load.expert]
        return self._crossing.results(layer, deferred=deferred, failed=failed)

    def _row(self, asked: _Asked, token: int) -> tuple[int, int]:
        """Return the forward, and its row, that a token of a joined call belongs to."""
        for i, n_rows in zip(asked.meeting, asked.n_rows, strict=True):
            if token < n_rows:
                return i, token
            token -= n_rows
        raise IndexError(f"the layer has no row {token}")

    def end(self, error: BaseException | None) -> None:
        """Unwind unfinished forwards and release all rows."""
        self.error = error
        for layer in (self._now, self._before[1] if self._before is not None else None):
            if layer is not None and layer.tensors is not None:
                self._crossing.let_go(layer)
        self._crossing.end()
        for forward in self._forwards:
            forward.close()


def _joined(calls: Sequence[ExpertsCall]) -> tuple[ExpertsCall | None, list[int]]:
    """Return calls of one layer as one, their rows one after the other, and how many each has."""
    n_rows = [call.hidden.shape[0] for call in calls]
    if len(calls) <= 1:
        return (calls[0] if calls else None), n_rows
    hidden, index, weights = (torch.cat([getattr(c, name) for c in calls]) for name in ExpertsCall._fields[1:])
    return ExpertsCall(calls[0].layer, hidden, index, weights), n_rows
