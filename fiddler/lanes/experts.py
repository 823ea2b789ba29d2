"""The work of expert jobs: rows to the experts, their weights, results in rows of their own, and the sums.

`ExpertWork` runs a job's loads, `combine` sums their results in routing order, and a `Crossing` brings a wave's
rows to the experts and the sums back. On a GPU the forward may run behind the host, so a crossing announces rows
before they are computed, reads the routing once it is there, and returns sums before they are computed.
`ComputeLane` runs all experts of a layer at once, for a forward without a driver (`model.generate()`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fiddler.cost.model import LANES, LaneName
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import CopyExpert, Failures, Job, RunExperts
from fiddler.scheduler.routing import LayerWork, Load, route
from fiddler.types import ExpertWeights, LaneStatistics

if TYPE_CHECKING:
    from fiddler.devices.arena import SimDevice


def gather(hidden: Tensor, work: LayerWork, top_k: int) -> Tensor:
    """Return the rows `[n, H]` of `hidden` `[T, H]` in the work's order, one per visit."""
    if hidden.shape[0] == 1:
        return hidden.expand(len(work.order), -1)
    return hidden.index_select(0, torch.tensor([p // top_k for p in work.order], dtype=torch.long, device="cpu"))


def combine(outputs: Tensor, order: Sequence[int], weights: Tensor) -> Tensor:
    """Return the weighted sum `[T, H]` of expert `outputs` `[n, H]`, over `weights` `[T, K]`, in routing order.

    `order` is the position in the flattened routing of each output.

    Every visit has a row of its own in one `[T·K, H]` buffer, zero where it was dropped, so the sum's order,
    and with it every bit of the result, depends on the routing alone.
    """
    n_tokens, top_k = weights.shape
    dropped = len(order)
    rows = [dropped] * (n_tokens * top_k)
    for row, position in enumerate(order):
        rows[position] = row
    if dropped < len(rows):
        outputs = torch.cat([outputs, outputs.new_zeros(1, outputs.shape[1])])
    return summed(outputs.index_select(0, torch.tensor(rows, dtype=torch.long, device="cpu")), weights)


def summed(visits: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum `[T, H]` of `visits` `[T·K, H]` over `weights` `[T, K]`, in routing order."""
    weighted = visits.view(*weights.shape, -1) * weights[..., None]  # [T, K, H]
    return weighted.sum(dim=1).to(visits.dtype)


@dataclass(slots=True)
class LaneCounters:
    """Counts of one lane's work; its worker is the only writer."""

    n_rows: int = 0
    n_loads: int = 0
    n_bytes: int = 0
    busy_s: float = 0.0

    def snapshot(self) -> LaneStatistics:
        """Return the state now."""
        return LaneStatistics(self.n_rows, self.n_loads, self.n_bytes, self.busy_s)


@dataclass(slots=True)
class HostRows:
    """A layer's rows on the host, `tensors` of a `Layer` there."""

    ask: "Ask"
    rows: Tensor  # [n, H], in the work's order
    out: Tensor  # [n, H], the experts' results


@dataclass(slots=True)
class ExpertWork:
    """Runs jobs in the calling thread; loads write disjoint rows, so lanes need no lock.

    A job whose layer was released does nothing.
    """

    host: CpuDevice
    accelerator: "SimDevice | None" = None
    counters: dict[LaneName, LaneCounters] = field(default_factory=lambda: {lane: LaneCounters() for lane in LANES})
    short: bool = False
    """Whether memory ran out; the engine resets it when it has freed some."""

    def __call__(self, job: Job) -> Failures:
        """Run a job; returns its failures by expert."""
        started = perf_counter()
        match job:
            case RunExperts():
                tensors: HostRows | None = job.layer.tensors
                if tensors is None:
                    return {}
                try:
                    self._run_loads(job, tensors, range(len(job.loads)))
                    failures: Failures = {}
                except BaseException:
                    failures = each(job.loads, partial(self._run_loads, job, tensors))
            case CopyExpert():
                failures = self._copy(job)
            case _:
                return {}
        self.counters[job.lane].busy_s += perf_counter() - started
        return failures

    def _run_loads(self, job: RunExperts, tensors: HostRows, which: Sequence[int]) -> None:
        index, loads, slots = job.layer.index, job.loads, job.slots
        if len(which) < len(loads):
            loads, slots = tuple(loads[i] for i in which), tuple(slots[i] for i in which if slots)
        weights: Sequence[ExpertWeights]
        if job.lane == "cpu":
            weights = self.host.experts(index, loads)
        else:
            assert self.accelerator is not None
            weights = self.accelerator.weights(index, slots)
        self.host.run(index, loads, weights, tensors.rows, tensors.out)
        counters = self.counters[job.lane]
        counters.n_loads += len(loads)
        for load, own in zip(loads, weights, strict=True):
            counters.n_rows += load.n_rows
            counters.n_bytes += own.nbytes

    def _copy(self, job: CopyExpert) -> Failures:
        assert self.accelerator is not None
        try:
            self.accelerator.copy(job.layer, job.expert, job.slot)
            (copied,) = self.accelerator.weights(job.layer, (job.slot,))
        except BaseException as error:
            return {job.expert: error}
        counters = self.counters["link"]
        counters.n_loads += 1
        counters.n_bytes += copied.nbytes
        return {}


def each(loads: Sequence[Load], run: Callable[[Sequence[int]], None]) -> Failures:
    """Run loads one by one; returns failures by expert."""
    failures: dict[int, BaseException] = {}
    for i, load in enumerate(loads):
        try:
            run((i,))
        except BaseException as error:
            failures[load.expert] = error
    return failures


class Ask(NamedTuple):
    """A layer's rows and their routing, on the forward's device."""

    layer: int
    hidden: Tensor  # [T, H]
    index: Tensor  # type: ignore[assignment]  # [T, K]; a field, not tuple.index
    weights: Tensor  # [T, K]
    ahead: Tensor | None  # [T, K'], experts that a look-ahead expects in the next layer
    own: "Own | None" = None


class Own(NamedTuple):
    """Tensors that a replayed forward on a GPU has made for its own request."""

    n_rows: int  # the first of its rows; the others count for nothing
    note: Tensor  # the routing as one tensor
    visits: Tensor  # [T·K, H] zeros, which the forward sums up itself


class Routing(NamedTuple):
    """The parts of an `Ask` that the host reads, in host memory."""

    index: Tensor  # type: ignore[assignment]  # [T, K]
    weights: Tensor  # [T, K]
    ahead: Tensor | None  # [T, K']


class Crossing(Protocol):
    """One wave's way to its experts and back. Its methods belong to the engine's thread."""

    @property
    def due(self) -> object:
        """A handle by which the GPU's lane knows when the latest dense part has ended."""
        ...

    def announce(self, ask: Ask) -> None:
        """Take the forward's request for a layer's experts, which may not be computed yet."""
        ...

    def conclude(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return the forwards' results, which are in host memory once their dense part is reported."""
        ...

    def routing(self) -> Routing:
        """Return the routing of the announced layer; call it only once its dense part is reported."""
        ...

    def open(self, work: LayerWork) -> Any:
        """Let the jobs of the announced layer begin; returns the tensors that they work on."""
        ...

    def results(self, layer: Layer, *, deferred: bool = False, failed: Sequence[Load] = ()) -> Tensor:
        """Return the weighted sums `[T, H]`, on the forward's device, of the layer's loads or of its deferred ones.

        Those that failed count as zero. The sums may be computed later, in the order of the forward's work. The
        layer's tensors are released if no deferred result is left to come.
        """
        ...

    def let_go(self, layer: Layer) -> None:
        """Release a layer's tensors."""
        ...

    def end(self) -> None:
        """Release an announced layer that was not opened."""
        ...


class HostCrossing:
    """A crossing for forwards on the CPU, where all tensors are there at once and stay in place."""

    due = None

    def __init__(self) -> None:
        self._ask: Ask | None = None

    def announce(self, ask: Ask) -> None:
        """Keep the request: it is computed already."""
        self._ask = ask

    def conclude(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return the results: they are there already."""
        return list(results)

    def routing(self) -> Routing:
        """Return the routing as it was asked."""
        assert self._ask is not None
        return Routing(*self._ask[2:5])

    def open(self, work: LayerWork) -> HostRows:
        """Group the rows by expert."""
        ask, self._ask = self._ask, None
        assert ask is not None
        hidden, (n_tokens, top_k) = ask.hidden, ask.index.shape
        rows = hidden.expand(len(work.order), -1) if n_tokens == 1 else gather(hidden, work, top_k)
        return HostRows(ask, rows, empty_results(rows))

    def results(self, layer: Layer, *, deferred: bool = False, failed: Sequence[Load] = ()) -> Tensor:
        """Sum up, in routing order."""
        work, tensors = layer.work, cast("HostRows", layer.tensors)
        ask, out = tensors.ask, tensors.out
        if deferred or not work.deferred:
            layer.tensors = None
        if not (work.deferred if deferred else work.loads):
            return ask.hidden.new_zeros(ask.hidden.shape)
        for load in failed:
            out[load.start : load.stop] = 0
        if not work.deferred:
            if ask.hidden.shape[0] == 1 and len(work.order) == ask.index.shape[1]:  # in place: see `route`
                return summed(out, ask.weights)
            return combine(out, work.order, ask.weights)
        n_now = work.loads[-1].stop if work.loads else 0  # rows that join in this layer; the deferred follow
        part = slice(n_now, None) if deferred else slice(0, n_now)
        return combine(out[part], work.order[part], ask.weights)

    def let_go(self, layer: Layer) -> None:
        """Release a layer's rows and results."""
        layer.tensors = None

    def end(self) -> None:
        """Release the announced request."""
        self._ask = None


@dataclass(frozen=True, slots=True)
class ComputeLane:
    """Runs every expert of a layer in the caller's thread."""

    device: CpuDevice
    n_experts: tuple[int, ...]
    """Number of experts by layer."""

    def run(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' output `[T, H]` for `hidden` `[T, H]`, routed by `index` and `weights` `[T, K]`."""
        experts, n_tokens = index.flatten().tolist(), index.shape[0]
        work = route(layer, experts, self.n_experts[layer], weights.flatten().tolist(), n_tokens=n_tokens)
        if not work.loads:
            return hidden.new_zeros(hidden.shape)
        rows = gather(hidden, work, index.shape[1])
        out = empty_results(rows)
        self.device.run(layer, work.loads, self.device.experts(layer, work.loads), rows, out)
        return combine(out, work.order, weights)
