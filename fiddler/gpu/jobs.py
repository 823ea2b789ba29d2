"""Runs the jobs of a machine with a GPU: queued on a stream, or done by a worker of the host and queued then.

A block that is not pinned is copied through a ring of pinned pieces. While the GPU copies one piece, the host
fills the next: the double buffering of pageable transfers (CUDA C++ Best Practices Guide, "Pinned Memory" and
"Asynchronous and Overlapping Transfers with Computation"). The driver stages such a copy too, but makes the host
wait for it (CUDA Runtime API, "API synchronization behavior").
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from fiddler.cost.model import LANES, LaneName
from fiddler.devices.arena import Arena
from fiddler.devices.cpu import CpuDevice, empty_results
from fiddler.gpu.crossing import GpuCrossing, GpuLayer, Watch
from fiddler.gpu.device import Event, Gpu
from fiddler.gpu.slots import SlotExperts
from fiddler.gpu.visits import Visits
from fiddler.lanes.experts import LaneCounters, each
from fiddler.scheduler.messages import CopyExpert, Failures, RunExperts
from fiddler.scheduler.routing import Load


@dataclass(frozen=True, slots=True)
class Copying:
    """Source and target of copies."""

    arena: Arena
    block: Callable[[int, int], Tensor]
    """(layer, expert) to its block on the host, `[n]` bytes."""
    pinned: Callable[[int, int], bool]
    """Whether a block is locked into RAM."""
    ring: "PinnedRing"
    """The ring for blocks that are not pinned."""


@dataclass(frozen=True, slots=True)
class Computed:
    """Results of a worker's loads: rows `[n, H]`, pinned, of `positions`; and failures."""

    layer: GpuLayer
    positions: Sequence[int]
    rows: Tensor
    failures: Failures


@dataclass(slots=True)
class GpuJobs:
    """Runs jobs. The streams keep the order between readers and writers of a slot."""

    gpu: Gpu
    watch: Watch
    host: CpuDevice
    experts: SlotExperts
    copying: Copying
    counters: dict[LaneName, LaneCounters] = field(default_factory=lambda: {lane: LaneCounters() for lane in LANES})
    short: bool = False
    """Whether the GPU's memory ran out for experts; the engine resets it when it has freed some."""
    _landing: dict[int, Event] = field(default_factory=dict)
    """By slot, the point at which the copy under way has landed."""
    _read: dict[int, Event] = field(default_factory=dict)
    """By slot, the end of the latest computation that read it."""

    def crossing(self) -> GpuCrossing:
        """Return a crossing for a new wave."""
        return GpuCrossing(self.gpu, self.watch)

    def launch(self, job: RunExperts) -> tuple[Event, Event] | None:
        """Queue loads behind their copies; returns where they begin and end, `None` if the layer was dropped."""
        layer: GpuLayer | None = job.layer.tensors
        if layer is None:
            return None
        main = self.gpu.main
        for slot in job.slots:
            if slot in self._landing:
                main.follow(self._landing[slot])
        began = main.mark()
        visits = _Grouped.of(job, layer, self.gpu)
        index, device = job.layer.index, self.gpu.device
        main.run(lambda: self.experts.run(index, visits.on(device), layer.ask.hidden, layer.visits))
        ended = main.mark()
        self._read.update(dict.fromkeys(job.slots, ended))
        self._count(job.lane, job)
        return began, ended

    def compute(self, job: RunExperts) -> Computed | None:
        """Run loads on the host, in a worker's thread; `None` if the layer was dropped."""
        layer: GpuLayer | None = job.layer.tensors
        if layer is None:
            return None
        index = job.layer.index
        layer.rows_there.wait()
        started = perf_counter()
        tokens = torch.tensor([p // layer.top_k for p in layer.positions(job.loads)])
        rows = layer.rows.index_select(0, tokens)
        out = self._results(rows)
        loads = _side_by_side(job.loads)

        def run(which: Sequence[int]) -> None:
            mine = [loads[i] for i in which]
            self.host.run(index, mine, self.host.experts(index, mine), rows, out)

        try:
            run(range(len(loads)))
            failures: Failures = {}
        except BaseException:
            failures = each(loads, run)
        self._count(job.lane, job)
        self.counters[job.lane].busy_s += perf_counter() - started
        ran = [(load, at) for load, at in zip(job.loads, loads, strict=True) if load.expert not in failures]
        if failures:
            out = torch.cat([empty_results(out[:0]), *(out[at.start : at.stop] for _, at in ran)])
        return Computed(layer, layer.positions([load for load, _ in ran]), out, failures)

    def _results(self, rows: Tensor) -> Tensor:
        """Return room for results; where no more memory can be pinned, the way up makes the host wait."""
        try:
            return self.gpu.pinned(*rows.shape, dtype=rows.dtype)
        except RuntimeError:
            return empty_results(rows)

    def land(self, computed: Computed) -> None:
        """Queue the way up of a worker's results, unless the layer was dropped."""
        layer, up = computed.layer, self.gpu.up
        if not layer.gone and computed.positions:
            positions = self.gpu.pinned(len(computed.positions), dtype=torch.int64)
            positions.copy_(torch.tensor(computed.positions))
            # The visits are zero by now: the worker's rows came down behind that.
            up.run(partial(_lift, layer.visits, positions, computed.rows))
            layer.up = up.mark()

    def pageable(self, job: CopyExpert) -> bool:
        """Whether a copy goes through the staging ring, and so through a worker."""
        return not self.copying.pinned(job.layer, job.expert)

    def copy(self, job: CopyExpert) -> tuple[Event, Event]:
        """Queue a copy behind the readers of its slot; returns where it begins and ends.

        A pageable block takes as long here as on the link: that is for a worker's thread.
        """
        copying, link = self.copying, self.gpu.link
        block = copying.block(job.layer, job.expert)
        if job.slot in self._read:
            link.follow(self._read[job.slot])
        began = link.mark()
        if self.pageable(job):
            copying.ring.copy(block, copying.arena.slots[job.slot, : block.nbytes])
        else:
            link.run(lambda: copying.arena.write(job.slot, block))
        return began, link.mark()

    def order(self, job: CopyExpert, landed: Event) -> None:
        """Queue all further work for the copy's slot behind the copy."""
        self._landing[job.slot] = landed
        counters = self.counters["link"]
        counters.n_loads += 1
        counters.n_bytes += self.host.weights(job.layer, job.expert).nbytes

    def landed(self, job: CopyExpert, event: Event) -> None:
        """Note that a copy has landed: nothing has to wait for it."""
        if self._landing.get(job.slot) is event:
            del self._landing[job.slot]

    def shrink(self, n_slots: int) -> None:
        """Reduce the number of slots, which must hold nothing. No lane may work."""
        self.gpu.link.follow(self.gpu.main.mark())  # which may still read the memory that slots will be in
        self.copying.arena.shrink(n_slots, self.gpu.reclaim)
        self._landing.clear()
        self._read.clear()

    def _count(self, lane: LaneName, job: RunExperts) -> None:
        counters = self.counters[lane]
        counters.n_rows += sum(load.n_rows for load in job.loads)
        counters.n_loads += len(job.loads)
        counters.n_bytes += sum(self.host.weights(job.layer.index, load.expert).nbytes for load in job.loads)


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Loads as the GPU takes them, still on the host: slots, bounds and positions side by side, pinned int32."""

    packed: Tensor
    groups: tuple[tuple[int, int, int], ...]
    top_k: int

    @classmethod
    def of(cls, job: RunExperts, layer: GpuLayer, gpu: Gpu) -> "_Grouped":
        pairs = sorted(zip(job.slots, job.loads, strict=True), key=lambda pair: pair[0])
        stop, groups = 0, list[tuple[int, int, int]]()
        for slot, load in pairs:
            groups.append((slot, stop, stop + load.n_rows))
            stop += load.n_rows
        numbers = [g[0] for g in groups] + [0] + [g[2] for g in groups]
        numbers += layer.positions([load for _, load in pairs])
        packed = gpu.pinned(len(numbers), dtype=torch.int32)
        packed.copy_(torch.tensor(numbers, dtype=torch.int32))
        return cls(packed, tuple(groups), layer.top_k)

    def on(self, device: torch.device) -> Visits:
        """Queue their way to the GPU."""
        n = len(self.groups)
        there = torch.empty_like(self.packed, device=device).copy_(self.packed, non_blocking=True)
        slots, bounds, positions = there.split([n, n + 1, len(there) - 2 * n - 1])
        most = max((stop - start for _, start, stop in self.groups), default=0)
        return Visits(slots, bounds, positions, most, len(positions), self.top_k, self.groups)


def _side_by_side(loads: Sequence[Load]) -> list[Load]:
    """Return the loads as they lie when only their rows are there."""
    stop, moved = 0, []
    for load in loads:
        moved.append(Load(load.expert, stop, stop + load.n_rows))
        stop += load.n_rows
    return moved


def _lift(visits: Tensor, positions: Tensor, rows: Tensor) -> None:
    """Copy rows `[n, H]` from the host into their `visits` `[T·K, H]`."""
    at = torch.empty_like(positions, device=visits.device).copy_(positions, non_blocking=True)
    visits.index_copy_(0, at, torch.empty_like(rows, device=visits.device).copy_(rows, non_blocking=True))


N_PIECES = 4
"""One is filled and one is copied; the others keep the link busy while this thread sleeps or is not scheduled."""

PIECE_BYTES = 2 << 20
"""A block takes its bytes and one piece's (the first overlaps nothing) at the host's rate, and a fixed time for
every piece. The sum is least where a piece is sqrt(block bytes * rate * time): 1 to 3 MB for blocks of 9 to 50 MB
(as in Qwen3-30B-A3B and gpt-oss-20b), a host that copies some 12 GB/s and 10 us to launch a copy from Python.
"""

POLL_S = 50e-6
"""Seconds between two polls of an event. Meanwhile the link copies the other pieces: 6 MiB, 100 us at 64 GB/s."""


class PinnedRing:
    """`n_pieces` pinned pieces, for one thread.

    `sleep` is given `POLL_S` whenever every piece is still being copied. Raises `RuntimeError` where there is no
    pinned memory.
    """

    def __init__(
        self,
        gpu: Gpu,
        *,
        n_pieces: int = N_PIECES,
        piece_bytes: int = PIECE_BYTES,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._link = gpu.link
        self._sleep = sleep
        with torch.inference_mode(False):  # or a thread that is not in inference mode could not write
            self._pieces = gpu.pinned(n_pieces, piece_bytes, dtype=torch.uint8)
        self._copied: list[Event | None] = [None] * n_pieces
        """By piece, the point on the link behind the last copy out of it."""
        self._turn = 0

    def copy(self, block: Tensor, to: Tensor) -> None:
        """Queue a copy of a pageable block on the link; both uint8 `[n]`.

        When this returns the block has been read, and `to` is whole once the link has done the work queued so far.
        Raises `ValueError` for other sizes, and the GPU's errors; part of the block may then be on its way.
        """
        if block.shape != to.shape:
            raise ValueError(f"a block of {tuple(block.shape)} bytes does not fit {tuple(to.shape)}")
        piece_bytes = self._pieces.shape[1]
        for run, place in zip(block.split(piece_bytes), to.split(piece_bytes), strict=True):
            self._send(run, place)

    def _send(self, run: Tensor, to: Tensor) -> None:
        """Copy bytes that fit into one piece."""
        turn = self._turn
        self._wait(turn)
        piece = self._pieces[turn, : len(run)]
        piece.copy_(run)
        self._turn = (turn + 1) % len(self._copied)
        try:
            self._link.run(partial(to.copy_, piece, non_blocking=True))
        finally:  # a launch that failed may have got as far as the GPU
            self._copied[turn] = self._link.mark()

    def _wait(self, turn: int) -> None:
        """Poll: waiting for the stream would also wait for work that others queue meanwhile."""
        copied = self._copied[turn]
        while copied is not None and not copied.done():
            self._sleep(POLL_S)
