"""Measures a model's dense part on a GPU, and the host's work per layer, in real steps whose experts give zero at
once.

A step is run by the engine's own runner, with a scheduler that plans as the engine's does, and recorded where the
engine would record it. It uses special lanes (`DenseLanes`) that finish expert jobs at once and report the dense
part when the GPU has done it. GPU time is the dense part including unhidden launches; the rest of the wall time is
the host's.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, cast

import torch

from fiddler.cache.policies import make_cache
from fiddler.calibration.measure import rising, typical
from fiddler.config import EngineConfig
from fiddler.cost.model import NO_TIME, CostModel, Curve, Dense
from fiddler.gpu.crossing import Due, GpuCrossing, Watch
from fiddler.gpu.device import Event, Gpu
from fiddler.lanes.runner import Runner
from fiddler.models.kv import KvArena, Run
from fiddler.models.loaded import ServableModel
from fiddler.models.lookahead import Lookahead
from fiddler.scheduler.core import scheduler_for
from fiddler.scheduler.messages import Job, JobDone, Report, RunDense
from fiddler.scheduler.waves import RowSpan, Waves
from fiddler.steps.graphs import LEAST_TOKENS, Graphs
from fiddler.steps.step import StepRunner
from fiddler.steps.wave import Experts


class DenseLanes:
    """Lanes of a GPU that run no expert; results stay zero."""

    timed_dense = True

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._reports: deque[Report] = deque()
        self._began: Event | None = None
        self.taken: list[float] = []
        """GPU seconds of each dense part of the step under way."""

    def begin(self, began: Event) -> None:
        """Begin a step: its first dense part has no mark of its own."""
        self._began = began
        self.taken = []

    now_s = staticmethod(perf_counter)

    def start(self, job: Job) -> None:
        """Finish a job at once, unless it is the dense part, which is reported when the GPU has done it."""
        if isinstance(job, RunDense):
            self._await_dense(job)
        else:
            self._reports.append(JobDone(job.job, None))

    def report(self) -> Report:
        """Poll until there is a report: no wait is as exact."""
        while not self._reports:
            self._reports += self._watch.collect()
        return self._reports.popleft()

    def drain(self) -> list[Report]:
        """Return the reports that are there."""
        drained = [*self._reports, *self._watch.collect()]
        self._reports.clear()
        return drained

    def close(self) -> None:
        """Do nothing: there is no thread to end."""

    def _await_dense(self, job: RunDense) -> None:
        due = cast("Due", job.due)
        began = due.began if due.began is not None else self._began
        assert began is not None

        def done() -> Report:
            self.taken.append(due.ended.since(began))
            return JobDone(job.job, None)

        self._watch.down(due.there, done)


ROWS = (1, 4, 16, 64, 256)
"""Rows of a wave: up to `max_running` of them are decoding sequences, more are a chunk of one prompt."""
SHORT = LEAST_TOKENS
"""Tokens of each decoding sequence: no recorded step attends to fewer."""
LONG = 8192
"""Tokens of all decoding sequences together, where that is at least twice as much for each. With 4 KB of keys and
values for a layer's token, as in Mixtral, a layer reads 32 MiB of them: much beside its constant costs."""
SHARE = 0.25
"""Share of experts the scheduler pretends are resident while we time the host, so that the result does not depend
on this GPU's memory. 0 where there are no slots."""
STEPS_S = 0.15
"""Seconds of measuring per row count and context, after the first steps."""
LEAST_STEPS = 3
MOST_STEPS = 50
WARM = 2
"""Steps of one kind that come before: the first runs as the model's code does, the second is recorded."""

_FIRST = 2
"""Tokens of a sequence's first step: one that is recorded has one, and does not make the past's layers."""


@dataclass(slots=True)
class _Sequence:
    """The parts of a request that a step reads."""

    past: Any
    record: None = None
    n_prompt: int = 0
    """Tokens of its prompt: as many as its rows."""

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Return numbers that are in every vocabulary."""
        return [position % 64 for position in range(start, stop)]


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one step: of a layer's dense part, of the output head, and of the host per layer."""

    layer_s: float
    head_s: float
    host_s: float


@dataclass(frozen=True, slots=True)
class Extent:
    """The range to measure: the steps that an engine of some configuration can run."""

    decoding: tuple[int, ...]
    """Row counts of decoding steps, a sequence each."""
    chunks: tuple[int, ...]
    """Row counts of prompt chunks."""
    tokens: int
    """Most tokens of all sequences together."""
    longest: int
    """Most tokens of one sequence."""
    recorded: bool
    """Whether decoding steps may be recorded."""
    ahead: bool
    """Whether the next layer's router is asked early, where some experts have slots."""

    @classmethod
    def of(cls, loaded: ServableModel, config: EngineConfig) -> "Extent":
        """Return the range of a configuration."""
        resolved = loaded.resolved
        room = resolved.kv_tokens or resolved.longest
        # Without packed steps a context has to be run as one prompt, which takes the memory of one.
        longest = min(resolved.longest, LONG if loaded.packed else config.chunk_tokens)
        most = min(config.max_running, room // _FIRST) if longest >= _FIRST else 0
        return cls(
            decoding=tuple(n for n in ROWS if n <= most),
            chunks=tuple(n for n in ROWS if config.max_running < n <= min(config.chunk_tokens, longest)),
            tokens=min(room, LONG),
            longest=longest,
            recorded=loaded.packed and config.graphs and not config.defer and loaded.rotary is None,
            ahead=config.asks_routers,
        )

    def contexts(self, n_rows: int) -> tuple[int, ...]:
        """Return the tokens of each of `n_rows` decoding sequences: few, and many where there is room."""
        room = min(self.tokens // n_rows, self.longest)
        short, long = min(SHORT, room), 1 << (room.bit_length() - 1)
        return (short, long) if long >= 2 * short else (short,)

    @property
    def most(self) -> int:
        """Most tokens of keys and values held at once."""
        return max((*self.chunks, *(n * max(self.contexts(n)) for n in self.decoding)), default=0)


class DenseBench:
    """Measures a model whose dense part is on the GPU, in the thread that `Gpu.enter` was called in.

    `costs` are those of its experts; `arena` has room for `Extent.most` tokens. No other step may be running.
    """

    def __init__(
        self,
        loaded: ServableModel,
        gpu: Gpu,
        arena: KvArena,
        config: EngineConfig,
        costs: CostModel,
        *,
        slots: bool,
    ) -> None:
        """`slots` says whether there are any slots."""
        self._gpu = gpu
        self._arena = arena
        self._packed = loaded.packed
        self._n_layers = len(loaded.n_experts)
        self._extent = Extent.of(loaded, config)
        watch = Watch()
        self._lanes = DenseLanes(watch)
        lookahead = Lookahead(loaded.model, loaded.experts) if slots and self._extent.ahead else None
        self._graphs: Graphs | None = None
        if loaded.packed:
            self._graphs = Graphs(loaded.model, gpu, arena, loaded.top_k * self._n_layers)
            self._graphs.lookahead = lookahead
            self._graphs.why_not = "" if self._extent.recorded else "nobody wants them"
        n_slots = round(SHARE * sum(loaded.n_experts)) if slots else 0
        cache = make_cache(config.policy, n_slots, loaded.n_experts, half_life=config.half_life)
        scheduler = scheduler_for(config, cache, costs)
        self._steps = StepRunner(
            loaded,
            Runner(scheduler, self._lanes),
            Experts(partial(GpuCrossing, gpu, watch), loaded.n_experts, lookahead=lookahead),
            Waves("one", scheduler, loaded.top_k),
            graphs=self._graphs,
        )

    def measure(self) -> tuple[Dense, float]:
        """Return the costs of the dense part, and the host's seconds per layer of a decoding step.

        A layer's cost is a whole step's without the head, divided by the layers that have experts. The head's rows
        are those of decoding steps; a chunk makes one row of logits. Raises the errors of a step.
        """
        extent, decoded, slopes = self._extent, dict[int, Step](), list[float]()
        if not extent.decoding:
            return Dense(NO_TIME), 0.0
        with torch.inference_mode():
            for n_rows in extent.decoding:
                short, *longer = extent.contexts(n_rows)
                decoded[n_rows] = step = self._decoding(n_rows, short)
                for long in longer:
                    more_s = self._decoding(n_rows, long).layer_s - step.layer_s
                    slopes.append(more_s / (n_rows * (long - short)))
            chunks = {n_rows: self._chunk(n_rows) for n_rows in extent.chunks}
        if self._graphs is not None:
            self._graphs.forget()
        context_s = max(median(slopes), 0.0) if slopes else 0.0
        tokens = {n: n * extent.contexts(n)[0] for n in decoded} | {n: n for n in chunks}
        rows = [(n, max(step.layer_s - context_s * tokens[n], 0.0)) for n, step in (decoded | chunks).items()]
        dense = Dense(Curve(rising(rows)), context_s, _head(decoded, chunks))
        return dense, median(step.host_s for step in decoded.values())

    def _decoding(self, n_rows: int, context: int) -> Step:
        """Let sequences decode, each its token number `context`."""
        start, runs = context - 1, [self._reserved(context) for _ in range(n_rows)]
        sequences = [_Sequence(self._steps.new_past(run)) for run in runs]

        def spans(n_before: int) -> list[RowSpan[Any]]:
            at = start if self._packed else start + n_before  # caches of transformers' own cannot be cut
            for sequence in sequences:
                if self._packed:
                    sequence.past.truncate(at)
            return [RowSpan(sequence, at, at + 1, last=True) for sequence in sequences]

        try:
            self._fill(sequences, start)
            return self._typical(spans)
        finally:
            self._release(runs)

    def _fill(self, sequences: Sequence[_Sequence], n_tokens: int) -> None:
        """Give sequences a past of `n_tokens` tokens; in an arena it is zeros, which are read all the same."""
        if self._packed:
            self._step([RowSpan(sequence, 0, _FIRST, last=True) for sequence in sequences])
            for sequence in sequences:
                sequence.past.extend(n_tokens)
        elif n_tokens:
            for sequence in sequences:
                self._step([RowSpan(sequence, 0, n_tokens, last=True)])

    def _chunk(self, n_rows: int) -> Step:
        """Run a prompt of `n_rows` tokens."""
        run = self._reserved(n_rows)

        def spans(n_before: int) -> list[RowSpan[Any]]:
            return [RowSpan(_Sequence(self._steps.new_past(run)), 0, n_rows, last=True)]

        try:
            return self._typical(spans)
        finally:
            self._release([run])

    def _typical(self, spans: Callable[[int], list[RowSpan[Any]]]) -> Step:
        """Run steps of one kind and return typical times; `spans` is given the number of steps before."""
        for n_before in range(WARM):
            self._step(spans(n_before))
        began_s, steps = perf_counter(), list[Step]()
        while len(steps) < LEAST_STEPS or (perf_counter() - began_s < STEPS_S and len(steps) < MOST_STEPS):
            steps.append(self._step(spans(WARM + len(steps))))
        return Step(*(typical([getattr(step, name) for step in steps]) for name in ("layer_s", "head_s", "host_s")))

    def _step(self, spans: list[RowSpan[Any]]) -> Step:
        lanes = self._lanes
        lanes.begin(self._gpu.main.mark())
        began_s = perf_counter()
        outcomes = self._steps.run(spans)
        wall_s = perf_counter() - began_s
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        *layers, head_s = lanes.taken
        host_s = max(wall_s - sum(lanes.taken), 0.0)
        return Step(sum(layers) / self._n_layers, head_s, host_s / self._n_layers)

    def _reserved(self, n_tokens: int) -> Run | None:
        if not self._packed:
            return None
        run = self._arena.reserve(max(n_tokens, _FIRST))
        assert run is not None, "the arena is too small"
        return run

    def _release(self, runs: Sequence[Run | None]) -> None:
        for run in runs:
            if run is not None:
                self._arena.release(run)


def _head(decoded: Mapping[int, Step], chunks: Mapping[int, Step]) -> Curve:
    """Return the output head by rows of a wave: it never falls, though a chunk has one row there."""
    points = [*rising([(n, step.head_s) for n, step in decoded.items()])]
    for n, step in chunks.items():
        points.append((n, max(step.head_s, points[-1][1])))
    return Curve(tuple(points))
