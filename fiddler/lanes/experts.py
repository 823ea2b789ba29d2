"""The numbers behind the jobs: rows out to the experts, the weights a lane runs them on, and their results back.

Results do not depend on who finished first. One wave's crossing brings its rows from the forward to the experts.

On a GPU the forward may run behind the host: what it asks for is announced before it is computed, read once it is
there, and answered before the answer has been computed.

A layer's experts at once, on the CPU, for a forward that nobody drives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fiddler.cost.lanes import LANES, LaneName
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import CopyExpert, Failures, Job, RunExperts
from fiddler.scheduler.routing import LayerWork, Load, route
from fiddler.types import ExpertWeights, LaneStatistics


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


class Accelerator(Protocol):
    """A memory of slots beside the host's."""

    def copy(self, layer: int, expert: int, slot: int) -> None:
        """Copy an expert's block into a slot."""
        ...

    def weights(self, layer: int, slots: Sequence[int]) -> Sequence[ExpertWeights]:
        """Return what lies in slots as experts of `layer`."""
        ...


@dataclass(slots=True)
class LaneCounters:
    """What one lane has done; its worker is the only writer."""

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
    """Does the work of jobs, in whichever thread calls; loads write disjoint rows, so lanes need no lock.

    A job whose layer was let go does nothing.
    """

    host: CpuDevice
    accelerator: Accelerator | None = None
    counters: dict[LaneName, LaneCounters] = field(default_factory=lambda: {lane: LaneCounters() for lane in LANES})
    short: bool = False
    """Whether memory ran out; whoever finds more sets this back."""

    def __call__(self, job: Job) -> Failures:
        """Do a job; returns what failed by expert."""
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


def all_or_each(loads: Sequence[Load], run: Callable[[Sequence[int]], None]) -> Failures:
    """Run loads, by their places; returns what failed by expert: if any did, each was run alone to see which."""
    try:
        run(range(len(loads)))
    except BaseException:
        return each(loads, run)
    return {}


def each(loads: Sequence[Load], run: Callable[[Sequence[int]], None]) -> Failures:
    """Run loads one by one; returns what failed by expert."""
    failures: dict[int, BaseException] = {}
    for i, load in enumerate(loads):
        try:
            run((i,))
        except BaseException as error:
            failures[load.expert] = error
    return failures


class Ask(NamedTuple):
    """A layer's rows and who is to visit whom; on the forward's device."""

    layer: int
    hidden: Tensor  # [T, H]
    index: Tensor  # type: ignore[assignment]  # [T, K]; a field, not tuple.index
    weights: Tensor  # [T, K]
    ahead: Tensor | None  # [T, K'], experts that a look-ahead expects in the next layer
    own: "Own | None" = None


class Own(NamedTuple):
    """What a forward on a GPU has made for its own ask, where it is replayed."""

    n_rows: int  # the first of its rows; the others count for nothing
    note: Tensor  # the routing as one tensor
    visits: Tensor  # [T·K, H] zeros, which the forward sums up itself


class Routing(NamedTuple):
    """What of an `Ask` the host has to know, in its memory."""

    index: Tensor  # type: ignore[assignment]  # [T, K]
    weights: Tensor  # [T, K]
    ahead: Tensor | None  # [T, K']


class Crossing(Protocol):
    """One wave's way to its experts and back. Its methods belong to the engine's thread."""

    @property
    def due(self) -> object:
        """What tells the GPU's lane when the latest dense part has ended."""
        ...

    def announce(self, ask: Ask) -> None:
        """Take note that the wave's forward asks for a layer, computed or not."""
        ...

    def conclude(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return what forwards have returned, in the host's memory once their dense part is reported."""
        ...

    def routing(self) -> Routing:
        """Return who visits whom in the layer that was announced. Not before its dense part is reported."""
        ...

    def open(self, work: LayerWork) -> Any:
        """Let jobs of the layer that was announced begin; returns the tensors that they work on."""
        ...

    def results(self, layer: Layer, *, deferred: bool = False, failed: Sequence[Load] = ()) -> Tensor:
        """Return the weighted sums `[T, H]`, on the forward's device, of the layer's loads or of its deferred ones.

        Those that failed count as zero. The sums may be computed later, in the order of the forward's work. The
        layer's tensors are let go where nothing else is to come of them.
        """
        ...

    def let_go(self, layer: Layer) -> None:
        """Let go of a layer's tensors."""
        ...

    def end(self) -> None:
        """Let go of what was announced and not opened."""
        ...


class HostCrossing:
    """For forwards on the CPU: everything is there at once, and stays where it is."""

    due = None

    def __init__(self) -> None:
        self._ask: Ask | None = None

    def announce(self, ask: Ask) -> None:
        """Keep it: it is computed."""
        self._ask = ask

    def conclude(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return them: they are there."""
        return list(results)

    def routing(self) -> Routing:
        """Return what was asked."""
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
        """Let go of a layer's rows and results."""
        layer.tensors = None

    def end(self) -> None:
        """Let go of what was asked."""
        self._ask = None


@dataclass(frozen=True, slots=True)
class ComputeLane:
    """Runs every expert of a layer in the caller's thread."""

    device: CpuDevice
    n_experts: tuple[int, ...]
    """By layer."""

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
