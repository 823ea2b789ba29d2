"""Measures a model's experts, copies and row moves on a GPU, with the engine's own jobs while no lane works.

Seconds are those between two events of the GPU, which is idle when the first one comes: as in a decoding step,
where the host has just read the routing, launches are included. The host polls events and never waits for the GPU.
`calibrate_gpu` adds the dense part and the host's own work.
"""

import hashlib
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from time import perf_counter

import torch
import transformers

from fiddler.cache.policy import Key
from fiddler.calibration import measure
from fiddler.calibration.costs import Calibration, calibrate
from fiddler.calibration.dense import DenseBench, Extent
from fiddler.calibration.measure import FITTED, HELD_OUT, Bench, Measured, Points, curve_of, typical
from fiddler.config import EngineConfig
from fiddler.cost.model import Contention, CostModel, Curve, ExpertCosts, Moves
from fiddler.devices.cpu import CpuDevice
from fiddler.gpu.crossing import GpuLayer, Watch
from fiddler.gpu.device import Event
from fiddler.gpu.jobs import Computed, GpuJobs
from fiddler.lanes.experts import Ask
from fiddler.models.kv import KvArena
from fiddler.models.loaded import ServableModel
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.messages import CopyExpert, RunExperts
from fiddler.scheduler.routing import route

SLOTS_BYTES = 512 << 20
"""Bytes of the slots that experts are run from, if there are as many: four times the largest L2 cache, or weights
would come from there. Source: 126.5 MB on a B200, as CUDA reports it (pytorch/ao, pull request 4002)."""
TOGETHER = 4
"""Experts of a run that is measured, if there are as many slots: half of the eight that a token of many models
visits. Each bears its share of the run's launches, since a cost model knows experts and not runs."""
MOST_ROWS = 512
"""Most rows of a run, over all its experts: with more rows each there are fewer experts, and no run takes more
memory than a step."""
AHEAD = 4
"""Copies that are queued at once, so that the link is busy while the host sleeps."""
PAUSE_S = 5e-5
"""Seconds between two polls of a copy: the host's experts may need the core."""

_WAVE = 0


def until(event: Event, pause_s: float = 0.0) -> None:
    """Poll an event until it is done, with pauses unless `pause_s` is 0."""
    while not event.done():
        if pause_s:
            time.sleep(pause_s)


@dataclass(frozen=True, slots=True)
class GpuExperts:
    """Measures with jobs of its own, in the thread that `Gpu.enter` was called in. Slots are overwritten."""

    jobs: GpuJobs
    n_experts: tuple[int, ...]
    """Number of experts by layer."""
    dtype: torch.dtype
    """The rows' kind of number."""

    @property
    def n_slots(self) -> int:
        """Slots that are used."""
        arena = self.jobs.copying.arena
        return min(arena.n_slots, SLOTS_BYTES // arena.slot_bytes + 1)

    def n_pinned(self, layer: int) -> int:
        """Return how many of a layer's blocks are locked into RAM."""
        return sum(self.jobs.copying.pinned(layer, expert) for expert in range(self.n_experts[layer]))

    def measure(self, layers: Sequence[int]) -> Measured:
        """Measure the experts of layers that share a shape; without slots, on the CPU alone."""
        bench = Bench(self.jobs.host, self.n_experts, dtype=self.dtype)
        with torch.inference_mode():
            keys = bench.sample(layers)
            on_host = [self.jobs.host.weights(*key) for key in keys]
            nbytes = on_host[0].nbytes
            cpu, cpu_held_out = bench.curve(layers[0], on_host)
            if not self.n_slots:
                return Measured(ExpertCosts(cpu, cpu, 0.0, nbytes), Contention(), cpu_held_out, ())
            gpu, gpu_held_out = self._curve(layers[0], keys)
            copies = partial(self._copies, keys)
            copy_s = self._copy_s(layers, len(keys))
            alone_s = typical(list(copies(measure.BESIDE_S)))
            contention = bench.contention(layers[0], on_host, copies, alone_s)
            return Measured(ExpertCosts(cpu, gpu, copy_s, nbytes), contention, cpu_held_out, gpu_held_out)

    def moves(self, layer: int) -> Moves:
        """Measure how long rows take to the host and results back: a line through few and many."""
        with torch.inference_mode():
            few_s, many_s = (self._there_and_back(layer, n_rows) for n_rows in (1, MOST_ROWS))
        row_s = max((many_s - few_s) / (MOST_ROWS - 1), 0.0)
        return Moves(max(few_s - row_s, 0.0), row_s)

    def _curve(self, layer: int, keys: Sequence[Key]) -> tuple[Curve, Points]:
        """Return the GPU's seconds by rows of an expert; it holds `keys` over and over while they are measured."""
        for slot, key in zip(range(self.n_slots), cycle(keys), strict=False):
            _, landed = self._copy(key, slot)
            until(landed, PAUSE_S)
        step = -(-self.n_slots // TOGETHER)  # apart from each other, as a layer's experts are
        slots = cycle([slot for first in range(step) for slot in range(first, self.n_slots, step)])
        run = partial(self._run, layer, slots)
        for n_rows in (*FITTED, *HELD_OUT):  # the first run may compile kernels
            run(n_rows)
        return curve_of(run)

    def _run(self, layer: int, slots: Iterator[int], n_rows: int) -> float:
        """Run experts of so many rows each from the next slots; returns the seconds of one."""
        most = min(TOGETHER, self.n_slots, self.n_experts[layer])
        n = max(1, min(most, MOST_ROWS // n_rows))
        with self._asked(layer, n_rows, n) as asked:
            mine = tuple(islice(slots, n))
            queued = self.jobs.launch(RunExperts(0, "gpu", asked, asked.work.loads, mine, 0.0))
            assert queued is not None
            return _took(*queued) / n

    def _copy_s(self, layers: Sequence[int], n_keys: int) -> float:
        """Return the link's seconds for an expert: the mean of blocks that are pinned and those that are not."""
        every = [(layer, expert) for expert in range(self.n_experts[layers[0]]) for layer in layers]
        pinned = [key for key in every if self.jobs.copying.pinned(*key)]
        pageable = [key for key in every if not self.jobs.copying.pinned(*key)]
        return sum(
            len(kind) / len(every) * typical(list(self._copies(kind[:n_keys], measure.BESIDE_S)))
            for kind in (pinned, pageable)
            if kind
        )

    def _copies(self, keys: Sequence[Key], budget_s: float | None) -> Generator[float]:
        """Copy experts into slots, one behind the other; see `measure.CopyLoop`. Seconds are the link's."""
        deadline = None if budget_s is None else perf_counter() + budget_s
        slots, queued = cycle(range(self.n_slots)), deque[tuple[Event, Event]]()
        try:
            for n_queued, key in enumerate(cycle(keys), 1):
                queued.append(self._copy(key, next(slots)))
                if len(queued) == AHEAD:
                    yield _took(*queued.popleft(), PAUSE_S)
                    if deadline is not None and perf_counter() > deadline and n_queued > AHEAD:
                        return
        finally:
            for _, landed in queued:
                until(landed, PAUSE_S)

    def _copy(self, key: Key, slot: int) -> tuple[Event, Event]:
        return self.jobs.copy(CopyExpert(0, *key, slot, "demand", 0.0))

    def _there_and_back(self, layer: int, n_rows: int) -> float:
        """Return the seconds of rows to the host, and of as many results to the GPU."""
        deadline, taken = perf_counter() + measure.BESIDE_S, list[float]()
        while len(taken) < measure.LEAST or perf_counter() < deadline:
            with self._asked(layer, n_rows, 1) as asked:
                tensors: GpuLayer = asked.tensors
                down_s = tensors.rows_there.since(tensors.note_came)
                results = self.jobs.gpu.pinned(*tensors.rows.shape, dtype=tensors.rows.dtype).zero_()
                began = self.jobs.gpu.up.mark()
                self.jobs.land(Computed(tensors, range(n_rows), results, {}))
                assert tensors.up is not None
                taken.append(down_s + _took(began, tensors.up))
        return typical(taken)

    @contextmanager
    def _asked(self, index: int, n_rows: int, n_experts: int) -> Generator[Layer]:
        """Have rows wait at a layer, each for this many experts, with nothing else running."""
        gpu, crossing, weight = self.jobs.gpu, self.jobs.crossing(), self.jobs.host.weights(index, 0).up[0]

        def ask() -> Ask:
            numbers = torch.Generator(gpu.device).manual_seed(0)  # nobody else's random numbers are used up
            shape = n_rows, weight.shape[1]
            hidden = torch.randn(shape, generator=numbers, device=gpu.device, dtype=torch.float32).to(self.dtype)
            visited = torch.arange(n_experts, device=gpu.device).expand(n_rows, -1)
            return Ask(index, hidden, visited, torch.ones_like(visited, dtype=torch.float32), None)

        crossing.announce(gpu.launch(ask))
        work = route(index, list(range(n_experts)) * n_rows, self.n_experts[index])
        layer = Layer(Wave(), work, n_rows, n_experts, tensors=crossing.open(work))
        until(layer.tensors.rows_there)
        until(gpu.main.mark())
        try:
            yield layer
        finally:
            crossing.let_go(layer)


def _took(began: Event, ended: Event, pause_s: float = 0.0) -> float:
    until(ended, pause_s)
    return ended.since(began)


def calibrate_gpu(loaded: ServableModel, jobs: GpuJobs, config: EngineConfig, *, anew: bool = False) -> Calibration:
    """Return a model's costs on a GPU: from the stored file, or measured and stored; see `calibrate`.

    The model's dense part is there, and no lane works. `jobs` are the engine's: slots are overwritten, but their
    counters and queues are left alone. Raises the errors of a step, such as `torch.OutOfMemoryError`.
    """
    try:
        return calibrate(GpuBench.of(loaded, jobs, config), loaded, config, anew=anew)
    finally:
        jobs.gpu.reclaim()


@dataclass(frozen=True, slots=True)
class GpuBench:
    """Measures with the engine's own devices, in the thread that `Gpu.enter` was called in."""

    loaded: ServableModel
    experts: GpuExperts
    config: EngineConfig

    @classmethod
    def of(cls, loaded: ServableModel, jobs: GpuJobs, config: EngineConfig) -> "GpuBench":
        """Measure with the devices of an engine's jobs."""
        gpu = jobs.gpu
        own = GpuJobs(gpu, Watch(), jobs.host, jobs.experts, jobs.copying)
        return cls(loaded, GpuExperts(own, loaded.n_experts, loaded.dtype), config)

    @property
    def host(self) -> CpuDevice:
        """The CPU device of the jobs."""
        return self.experts.jobs.host

    @property
    def device_name(self) -> str:
        """Key of the costs: the GPU, the dense part, and the engine's limits."""
        model = f"{_outline(self.loaded.model)}, transformers {transformers.__version__}"
        how = f"packed {self.loaded.packed}, {Extent.of(self.loaded, self.config)}"
        return f"cuda {self.experts.jobs.gpu.name}, {self.experts.n_slots} slots, {model}, {how}"

    def way(self, layer: int) -> str:
        """Return how a layer's experts come to their slots: pinned or not."""
        n, n_experts = self.experts.n_pinned(layer), self.loaded.n_experts[layer]
        return f", {n} of {n_experts} pinned" if self.experts.n_slots else ""

    def measure(self, layers: Sequence[int]) -> Measured:
        """Measure the experts of layers that share a shape and a way."""
        return self.experts.measure(layers)

    def completed(self, costs: CostModel) -> CostModel:
        """Add the measured costs of row moves, the dense part, and the host's work per layer."""
        costs = replace(costs, moves=self.experts.moves(0))
        gpu = self.experts.jobs.gpu
        arena = KvArena(Extent.of(self.loaded, self.config).most)
        slots = self.experts.n_slots > 0
        dense, host_s = DenseBench(self.loaded, gpu, arena, self.config, costs, slots=slots).measure()
        arena.check()
        assert arena.n_free == arena.n_tokens, "keys and values are still held"
        return replace(costs, dense=dense, host_s=host_s)


def _outline(model: torch.nn.Module) -> str:
    """Return a key of a dense part: the names, shapes and dtypes of its weights."""
    weights = "; ".join(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters())
    return hashlib.sha256(weights.encode()).hexdigest()[:12]
