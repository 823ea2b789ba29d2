"""The numbers behind the jobs: a layer's rows, the weights a lane runs them on, their results.

Rows out to the experts and their results back, independent of who finished first.

Where rows cross from a model's forward to its experts, and results back.

On a GPU the forward may run behind the host: what it asks for is announced before it is computed, read once it is
there, and answered before the answer has been computed.

A layer's experts at once, on the CPU, for a forward that nobody drives.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fiddler.cost.lanes import LANES, LaneName
from fiddler.devices.cpu import CpuDevice, empty_results
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
class _Buffers:
    rows: Tensor  # [n, H], in the work's order
    out: Tensor  # [n, H]


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
    _open: dict[tuple[int, int], _Buffers] = field(default_factory=dict)

    def open(self, wave: int, layer: int, rows: Tensor) -> None:
        """Take a layer's rows `[n, H]`, one per visit, before its jobs start."""
        self._open[wave, layer] = _Buffers(rows, empty_results(rows))

    def results(self, wave: int, layer: int, failed: Iterable[Load] = ()) -> Tensor:
        """Return a layer's outputs `[n, H]`, zero for loads that failed. Those that still run are not there yet."""
        out = self._open[wave, layer].out
        for load in failed:
            out[load.start : load.stop] = 0
        return out

    def let_go(self, wave: int, layer: int) -> None:
        """Forget a layer's rows and results; nothing happens if it is not open."""
        self._open.pop((wave, layer), None)

    def __call__(self, job: Job) -> Failures:
        """Do a job; returns what failed by expert."""
        started = perf_counter()
        match job:
            case RunExperts():
                failures = self._run(job)
            case CopyExpert():
                failures = self._copy(job)
            case _:
                return {}
        self.counters[job.lane].busy_s += perf_counter() - started
        return failures

    def _run(self, job: RunExperts) -> Failures:
        buffers = self._open.get((job.wave, job.layer))
        if buffers is None:
            return {}
        return all_or_each(job.loads, partial(self._run_loads, job, buffers))

    def _run_loads(self, job: RunExperts, buffers: _Buffers, which: Sequence[int]) -> None:
        loads, slots = job.loads, job.slots
        if len(which) < len(loads):
            loads, slots = tuple(loads[i] for i in which), tuple(slots[i] for i in which if slots)
        weights: Sequence[ExpertWeights]
        if job.lane == "cpu":
            weights = self.host.experts(job.layer, loads)
        else:
            assert self.accelerator is not None
            weights = self.accelerator.weights(job.layer, slots)
        self.host.run(job.layer, loads, weights, buffers.rows, buffers.out)
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
        failures: dict[int, BaseException] = {}
        for i, load in enumerate(loads):
            try:
                run((i,))
            except BaseException as error:
                failures[load.expert] = error
        return failures
    return {}


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
    """The layers on their way, by wave and layer. Its methods belong to the engine's thread."""

    def announce(self, wave: int, ask: Ask) -> None:
        """Take note that a wave's forward asks for a layer, computed or not."""
        ...

    def conclude(self, wave: int, results: Sequence[Tensor]) -> list[Tensor]:
        """Return what forwards have returned, in the host's memory once their dense part is reported."""
        ...

    def routing(self, wave: int, layer: int) -> Routing:
        """Return who visits whom. Not before the lanes have reported the dense part that ends in the layer."""
        ...

    def open(self, wave: int, work: LayerWork) -> None:
        """Let jobs of the layer begin."""
        ...

    def results(self, wave: int, layer: int, *, deferred: bool = False, failed: tuple[Load, ...] = ()) -> Tensor:
        """Return the weighted sums `[T, H]`, on the forward's device, of the layer's loads or of its deferred ones.

        Those that failed count as zero. The sums may be computed later, in the order of the forward's work.
        """
        ...

    def let_go(self, wave: int, layer: int) -> None:
        """Forget a layer; nothing happens if it is not known."""
        ...

    def end(self, wave: int) -> None:
        """Forget a wave whose layers were let go."""
        ...


@dataclass(slots=True)
class _Open:
    ask: Ask
    work: LayerWork | None = None

    @property
    def n_now(self) -> int:
        """Rows that join in this layer; the deferred follow."""
        assert self.work is not None
        return self.work.loads[-1].stop if self.work.loads else 0


@dataclass(frozen=True, slots=True)
class HostCrossing:
    """For forwards on the CPU: everything is there at once, and stays where it is."""

    experts: ExpertWork
    _layers: dict[tuple[int, int], _Open] = field(default_factory=dict)

    def announce(self, wave: int, ask: Ask) -> None:
        """Keep it: it is computed."""
        self._layers[wave, ask.layer] = _Open(ask)

    def conclude(self, wave: int, results: Sequence[Tensor]) -> list[Tensor]:
        """Return them: they are there."""
        return list(results)

    def routing(self, wave: int, layer: int) -> Routing:
        """Return what was asked."""
        return Routing(*self._layers[wave, layer].ask[2:5])

    def open(self, wave: int, work: LayerWork) -> None:
        """Group the rows by expert."""
        layer = self._layers[wave, work.layer]
        layer.work = work
        self.experts.open(wave, work.layer, gather(layer.ask.hidden, work, layer.ask.index.shape[1]))

    def results(self, wave: int, layer: int, *, deferred: bool = False, failed: tuple[Load, ...] = ()) -> Tensor:
        """Sum up, in routing order."""
        found = self._layers[wave, layer]
        work, ask = found.work, found.ask
        assert work is not None
        if not (work.deferred if deferred else work.loads):
            return ask.hidden.new_zeros(ask.hidden.shape)
        outputs = self.experts.results(wave, layer, failed)
        if not work.deferred:
            return combine(outputs, work.order, ask.weights)
        part = slice(found.n_now, None) if deferred else slice(0, found.n_now)
        return combine(outputs[part], work.order[part], ask.weights)

    def let_go(self, wave: int, layer: int) -> None:
        """Forget a layer's rows and results."""
        self._layers.pop((wave, layer), None)
        self.experts.let_go(wave, layer)

    def end(self, wave: int) -> None:
        """Nothing is kept by wave."""


@dataclass(frozen=True, slots=True)
class ComputeLane:
    """Runs every expert of a layer in the caller's thread."""

    device: CpuDevice
    n_experts: tuple[int, ...]
    """By layer."""

    def run(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' output `[T, H]` for `hidden` `[T, H]`, routed by `index` and `weights` `[T, K]`."""
        work = route(layer, index.flatten().tolist(), self.n_experts[layer], weights.flatten().tolist())
        if not work.loads:
            return hidden.new_zeros(hidden.shape)
        rows = gather(hidden, work, index.shape[1])
        out = empty_results(rows)
        self.device.run(layer, work.loads, self.device.experts(layer, work.loads), rows, out)
        return combine(out, work.order, weights)
