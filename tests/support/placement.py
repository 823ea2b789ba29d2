"""The same steps of one model on different machines, to compare them bit by bit.

A `Subject` is a model loaded with both stores; a `Script` says who joins and leaves at which step, with the text
already written, so that every run has the same rows in every wave. `run` plays a script on a `Placement` and
returns each step's logits.
"""

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import anyio
import torch
from torch import Tensor

from fiddler.calibration.costs import Calibration
from fiddler.calibration.kernels import compute_lane, torch_worker
from fiddler.config import EngineConfig, resolve
from fiddler.cost.model import LANES, CostModel, LaneName
from fiddler.devices.kernels import BUCKETS, KernelName, Kernels, shape_key
from fiddler.engine import gpu_assembly, sim_assembly
from fiddler.engine.assembly import Rig, assemble_rig
from fiddler.gpu import cuda
from fiddler.lab import machine
from fiddler.lanes.experts import ExpertWork
from fiddler.lanes.laneset import Execute, LaneSet
from fiddler.lanes.threads import ThreadLanes
from fiddler.models import dense, seam
from fiddler.models.loaded import ServableModel, load
from fiddler.scheduler.messages import CopyExpert, Failures, Job, JobDone, LaneDied
from fiddler.scheduler.waves import assemble
from tests.support.fake_gpu import FakeGpu

MakeLanes = Callable[[ExpertWork], LaneSet]


@dataclass(frozen=True)
class Visit:
    """One sequence: `ids` are its prompt, of `n_prompt` tokens, and what follows."""

    ids: tuple[int, ...]
    n_prompt: int
    joins: int
    """The first step it may take part in."""
    leaves: int
    """The first step it takes no part in, done or not."""


@dataclass(frozen=True)
class Script:
    """Who is there, and how many prompt tokens may join one step."""

    visits: tuple[Visit, ...]
    chunk_tokens: int


@dataclass(frozen=True)
class Placement:
    """A machine: its options and, where they are not to be its own, its costs and its lanes."""

    config: EngineConfig = field(default_factory=EngineConfig)
    costs: CostModel | None = None
    lanes: MakeLanes | None = None
    gpu: FakeGpu | None = None
    """What `device="cuda"` finds."""


@dataclass(eq=False)
class Running:
    """A visit on its way."""

    visit: Visit
    past: Any
    n_past: int = 0

    @property
    def n_prompt(self) -> int:
        return self.visit.n_prompt

    @property
    def prefilling(self) -> bool:
        return self.n_past < self.n_prompt

    @property
    def ended(self) -> bool:
        return self.n_past >= len(self.visit.ids)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        return self.visit.ids[start:stop]


@dataclass(frozen=True)
class Played:
    """What a run gave: by step and visit the logits `[V]`, and the rig, which is closed."""

    logits: dict[tuple[int, int], Tensor]
    rig: Rig

    def differs_from(self, other: "Played") -> str:
        """Say where the bits of two runs part; empty where they do not."""
        if self.logits.keys() != other.logits.keys():
            return f"{len(self.logits)} logits, not {len(other.logits)}"
        for (step, visit), logits in self.logits.items():
            if not torch.equal(logits, other.logits[step, visit]):
                off = float((logits.double() - other.logits[step, visit].double()).abs().max())
                return f"step {step}, visit {visit}: off by {off:.3g}"
        return ""


@dataclass(frozen=True)
class Subject:
    """One checkpoint, loaded with either store, and the kernels that all its runs share."""

    mapped: ServableModel
    packed: ServableModel
    kernels: Kernels

    @classmethod
    def open(cls, folder: Path, kernels: Kernels | None = None) -> "Subject":
        mapped, packed = load(folder, EngineConfig()), load(folder, EngineConfig(store="packed"))
        kernels = varied_kernels(packed) if kernels is None else kernels
        for loaded in (mapped, packed):
            dense.accelerate(loaded.model, kernels)
            seam.bind(loaded.experts, compute_lane(loaded, kernels).run)
        return cls(mapped, packed, kernels)

    @property
    def n_experts(self) -> int:
        return sum(self.mapped.n_experts)

    @property
    def n_vocabulary(self) -> int:
        embeddings: Any = self.mapped.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    def on(self, config: EngineConfig) -> ServableModel:
        """Return the model as `config` would have it opened."""
        own = self.mapped.resolved
        resolved = resolve(
            config,
            checkpoint_dtype=own.dtype,
            model_context=own.max_context,
            has_cuda=config.device == "cuda",
        )
        return replace(self.packed if resolved.store == "packed" else self.mapped, resolved=resolved)


def varied_kernels(loaded: ServableModel) -> Kernels:
    """Return a calibration in which neighbouring row counts of a shape take different kernels."""
    samples = [loaded.weights(layer, 0) for layer in range(len(loaded.n_experts))]
    matrices = [m for sample in samples for m in (*sample.up, sample.down)] + list(dense.matrices(loaded.model))
    names: tuple[KernelName, ...] = ("rows_last", "linear")
    choice: dict[tuple[Any, int], KernelName] = {}
    for matrix in matrices:
        for i, rows in enumerate(BUCKETS):
            choice[shape_key(matrix), rows] = names[(i + matrix.shape[0]) % 2] if rows > 1 else "vector"
    return Kernels(choice)


def run(subject: Subject, script: Script, placement: Placement | None = None) -> Played:
    """Play a script on a placement: by default the CPU alone, with experts where they lie in the file."""
    placement = placement or Placement()
    with torch.inference_mode(), _patched(placement):
        loaded = subject.on(placement.config)
        rig = assemble_rig(loaded, subject.kernels, placement.config)
        return Played(anyio.run(_play, loaded, rig, script), rig)


async def _play(loaded: ServableModel, rig: Rig, script: Script) -> dict[tuple[int, int], Tensor]:
    logits: dict[tuple[int, int], Tensor] = {}
    arena = rig.steps.arena
    runs = [None if arena is None else arena.reserve(len(visit.ids)) for visit in script.visits]
    arrivals = [
        (visit, Running(visit, rig.steps.new_past(run))) for visit, run in zip(script.visits, runs, strict=True)
    ]
    for step in count():
        if all(running.ended or step >= visit.leaves for visit, running in arrivals):
            break
        present = [r for v, r in arrivals if v.joins <= step < v.leaves and not r.ended]
        spans: list[Any] = list(assemble(present, script.chunk_tokens, chunked=loaded.packed))
        for span, outcome in zip(spans, rig.steps.run(spans) if spans else [], strict=True):
            if outcome.error is not None:
                raise outcome.error
            span.request.n_past = span.stop
            if outcome.logits is not None:
                visit = next(i for i, (_, r) in enumerate(arrivals) if r is span.request)
                logits[step, visit] = outcome.logits.clone()
        rig.scheduler.check()
    rig.close()
    rig.scheduler.check()
    assert rig.scheduler.idle
    return logits


@contextmanager
def _patched(placement: Placement) -> Generator[None]:
    with ExitStack() as stack:
        if placement.costs is not None:
            calibration = Calibration(placement.costs, (), Path(), fresh=False)
            stack.enter_context(patch.object(sim_assembly, "calibrate", lambda *_: calibration))
            stack.enter_context(patch.object(machine, "described_costs", lambda *_: placement.costs))
            stack.enter_context(patch.object(gpu_assembly, "_costs", lambda *_: placement.costs))
        stack.enter_context(patch.object(cuda, "open_gpu", lambda: placement.gpu))
        make = placement.lanes
        if make is not None:
            stack.enter_context(patch.object(sim_assembly, "_lanes", lambda _resolved, work, *_: make(work)))
        yield


def jittered(seed: int, work: ExpertWork) -> ThreadLanes:
    """Return a thread for each lane, every job of which takes up to a millisecond longer than it does."""

    def execute(job: Job) -> Failures:
        random = Random(f"{seed} {job.job}")
        time.sleep(random.choice((0.0, 0.0, 1e-4, 1e-3)))
        failures = work(job)
        time.sleep(random.choice((0.0, 0.0, 1e-4)))
        return failures

    return ThreadLanes(execute, working=partial(torch_worker, torch.get_num_threads()))


@dataclass
class ShuffledLanes:
    """Lanes in which dice say whose job is done next and when it is reported: any order that threads may have.

    Within a lane the order is the usual one. With `timed_dense` the dense parts are jobs as well, so waves pass
    each other wherever they may.
    """

    execute: Execute
    random: Random
    timed_dense: bool
    _queues: dict[LaneName, list[Job]] = field(default_factory=lambda: {lane: [] for lane in LANES})
    _done: deque[JobDone | LaneDied] = field(default_factory=deque)
    _now_s: float = 0.0

    def now_s(self) -> float:
        self._now_s += self.random.random() * 1e-4
        return self._now_s

    def start(self, job: Job) -> None:
        queue = self._queues[job.lane]
        place = len(queue)
        while place and _waits(queue[place - 1]) and not _waits(job):
            place -= 1
        queue.insert(place, job)
        while self.random.random() < 0.3 and any(self._queues.values()):
            self._run_one()

    def report(self) -> JobDone | LaneDied:
        while not self._done or (self.random.random() < 0.3 and any(self._queues.values())):
            self._run_one()
        return self._done.popleft()

    def drain(self) -> list[JobDone | LaneDied]:
        drained = list(self._done)
        self._done.clear()
        return drained

    def close(self) -> None:
        pass

    def _run_one(self) -> None:
        queue = self.random.choice([queue for queue in self._queues.values() if queue])
        job = queue.pop(0)
        self._done.append(JobDone(job.job, self.random.random() * 1e-4, self.execute(job)))


def _waits(job: Job) -> bool:
    return isinstance(job, CopyExpert) and not job.urgent


def shuffled(seed: int, work: ExpertWork) -> ShuffledLanes:
    """Return lanes whose order is the seed's."""
    random = Random(seed)
    return ShuffledLanes(work, random, timed_dense=random.random() < 0.5)
