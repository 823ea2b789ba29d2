"""Runs sequences on a described machine in virtual time, from routing alone: no model, no torch.

`Bound` and `Chain` give the times that no schedule of the same reads can beat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fiddler.cache.policy import Key
from fiddler.config import WaveMode
from fiddler.cost.model import LANES, LaneName
from fiddler.errors import ConfigError, EngineFailedError
from fiddler.lab.machine import Machine, cost_model
from fiddler.lab.script import Script, ScriptWave
from fiddler.lab.shape import ModelShape
from fiddler.lab.systems import SYSTEMS, System, cache_of, planner, prefetch_of
from fiddler.lanes.runner import Runner, run_step
from fiddler.lanes.virtual import VirtualLanes
from fiddler.recording import Recording
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.waves import RowSpan, Waves, assemble
from fiddler.trace import Trace
from fiddler.types import PrefetchStatistics


@dataclass(frozen=True, slots=True)
class Bound:
    """A time that no schedule of the same bytes can beat: the longest of three reads, each at its full rate.

    `max(bytes_cpu / B_H, bytes_link / B_P, bytes_gpu / B_V)`; the dense part and the keys and values read count as
    the GPU's.
    """

    cpu_s: float
    link_s: float
    gpu_s: float

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.cpu_s, self.link_s, self.gpu_s)


class Chain:
    """Reads in the order in which layers need them: the dense part, then CPU and GPU side by side, then the next.

    Copies are left out, since they may be made ahead. Where a step is two waves, one's dense part may hide behind
    the other's experts, and its longest read alone counts.
    """

    def __init__(self, machine: Machine, read_bytes: Mapping[LaneName, int]) -> None:
        self.seconds = 0.0
        """Seconds of all steps so far: no schedule of the same waves takes less."""
        self._machine = machine
        self._read_bytes = read_bytes
        self._layers: list[tuple[float, float]] = []  # seconds of the CPU's reads and of the GPU's
        self._before = (0, 0)
        self.layer()
        self._layers.clear()

    def layer(self) -> None:
        """Add a layer whose experts have run."""
        now, before = (self._read_bytes["cpu"], self._read_bytes["gpu"]), self._before
        rates = self._machine.cpu_read_bytes_per_s, self._machine.gpu_read_bytes_per_s
        self._layers.append(((now[0] - before[0]) / rates[0], (now[1] - before[1]) / rates[1]))
        self._before = now

    def step(self, n_waves: int, dense_bytes: int) -> None:
        """Add the end of a step in which the GPU read this many bytes besides experts."""
        dense_s = dense_bytes / self._machine.gpu_read_bytes_per_s
        if n_waves == 1:
            self.seconds += dense_s + sum(max(layer) for layer in self._layers)
        else:
            cpu_s, gpu_s = (sum(reads) for reads in zip(*self._layers, strict=True))
            self.seconds += max(cpu_s, gpu_s + dense_s)
        self._layers.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The input of a simulation: a model's shape on a machine, and how its experts are placed.

    Raises `ConfigError` for a number that is impossible; unknown names are found when it is run.
    """

    shape: ModelShape
    machine: Machine
    n_slots: int
    system: System = SYSTEMS["fiddler"]
    popular: Sequence[Key] | None = None
    """Every expert, most visited in other text first: the order of static placements, and every cache's start."""
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        if self.n_slots < 0:
            raise ConfigError(f"n_slots={self.n_slots!r} must be at least 0")
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens!r} must be at least 1")
        if self.system.waves not in get_args(WaveMode):
            raise ConfigError(f"unknown wave mode {self.system.waves!r}; known: {', '.join(get_args(WaveMode))}")


@dataclass(frozen=True, slots=True)
class Report:
    """Results of a run. Seconds are virtual."""

    preload_s: float
    """Seconds until the slots were filled, before the sequences came."""
    first_token_s: float
    """Seconds until every sequence had its first token."""
    decode_s: float
    """Seconds from then on."""
    n_decoded: int
    """Tokens made in `decode_s`."""
    utilisation: dict[LaneName, float]
    """Share of the decoding time each lane was busy."""
    read_bytes: dict[LaneName, int]
    """Bytes of experts each lane computed with, or copied, while decoding."""
    bound: Bound
    """Bound of the decoding."""
    chain_s: float
    """Bound of the decoding with layers one after the other; see `Chain`."""
    n_hits: int
    """Loads that ran from a slot while decoding; the next two ran on the CPU, or were copied in first."""
    n_cpu: int
    n_fetches: int
    n_promotions: int
    """Experts copied in while decoding because they are visited often."""
    prefetch: PrefetchStatistics
    """Experts copied ahead in the whole run."""
    prediction_error: float
    """Median of `|predicted / measured - 1|` of the makespans of the latest layers, prompts included."""
    n_steps: int
    """Steps while decoding; the next is the same."""
    n_steps_in_two_waves: int
    trace: Trace | None = field(default=None, compare=False)

    @property
    def decodes_from_s(self) -> float:
        """The moment on the trace's clock from which all sequences decode."""
        return self.preload_s + self.first_token_s

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, over all sequences."""
        return self.n_decoded / self.decode_s if self.decode_s else 0.0

    @property
    def of_bound(self) -> float:
        """The bound's share of the time taken: 1.0 is as fast as its bytes allow."""
        return self.bound.seconds / self.decode_s if self.decode_s else 0.0

    @property
    def of_chain(self) -> float:
        """The share of the time taken that the same reads need in the order of the layers."""
        return self.chain_s / self.decode_s if self.decode_s else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return everything but the trace."""
        fields = {name: value for name, value in asdict(replace(self, trace=None)).items() if name != "trace"}
        n_tokens = self.n_decoded or 1
        return fields | {
            "tokens_per_s": self.tokens_per_s,
            "read_bytes_per_token": {lane: nbytes / n_tokens for lane, nbytes in self.read_bytes.items()},
            "bound": {**asdict(self.bound), "seconds": self.bound.seconds},
            "of_bound": self.of_bound,
            "of_chain": self.of_chain,
        }


def simulate(setting: Setting, sequences: Sequence[Recording], *, trace: Trace | None = None) -> Report:
    """Run sequences side by side to their ends, as they were recorded.

    Raises `ConfigError` for a routing of another shape than the model's, and for a policy, planner or prefetch that
    there is not.
    """
    for recording in sequences:
        _check(setting.shape, recording.experts, recording.n_prompt)
        if recording.ahead is not None and recording.ahead.shape != recording.experts.shape:
            raise ConfigError(f"a look-ahead of {recording.ahead.shape}, a routing of {recording.experts.shape}")
    return _Simulation(setting, sequences, trace).run()


def _check(shape: ModelShape, routing: NDArray[np.int16], n_prompt: int) -> None:
    expected = (shape.n_layers, shape.top_k)
    if routing.shape[1:] != expected:
        raise ConfigError(f"a routing of {routing.shape[1:]} layers and choices; {shape.name} has {expected}")
    if not 0 <= n_prompt <= len(routing):
        raise ConfigError(f"a prompt of {n_prompt} tokens in a routing of {len(routing)}")
    if routing.size and not (routing.min() >= -1 and routing.max() < shape.n_experts):
        raise ConfigError(f"a routing visits experts that {shape.name} does not have")


@dataclass(frozen=True, slots=True)
class _Mark:
    """State of the machine at one moment."""

    at_s: float
    busy_s: dict[LaneName, float]
    read_bytes: dict[LaneName, int]
    hits: int
    cpu: int
    fetches: int
    promotions: int


class _Simulation:
    def __init__(self, setting: Setting, sequences: Sequence[Recording], trace: Trace | None) -> None:
        shape, placed = setting.shape, setting.system
        costs = cost_model(shape, setting.machine)
        self._setting = setting
        self._n_experts = (shape.n_experts,) * shape.n_layers
        cache = cache_of(placed, setting.n_slots, self._n_experts, shape.top_k, setting.popular)
        self._trace = trace
        self._scheduler = Scheduler(
            cache,
            costs,
            planner=planner(placed.planner),
            promote=placed.promote,
            ahead=prefetch_of(placed.prefetch, cache),
            trace=trace,
        )
        self._lanes = VirtualLanes(costs, trace=trace, overlap=placed.overlap)
        self._runner = Runner(self._scheduler, self._lanes)
        self._waves = Waves(placed.waves, self._scheduler, shape.top_k)
        self._scripts = [Script(recording) for recording in sequences]
        self._chain = Chain(setting.machine, self._lanes.read_bytes)
        self._dense_bytes = 0
        self._n_steps = 0
        self._n_two = 0
        self._n_decoded = 0
        self._began_s = 0.0

    def run(self) -> Report:
        """Fill the slots, then run every step."""
        self._runner.preload(self._setting.popular)
        self._began_s = self._lanes.now_s()
        while running := self._running():
            if not any(script.prefilling for script in running):
                break
            self._step(running)
        first = self._mark()
        self._chain.seconds = 0.0
        self._dense_bytes = self._n_decoded = self._n_steps = self._n_two = 0
        while running := self._running():
            self._step(running)
        return self._report(first, self._mark())

    def _running(self) -> list[Script]:
        return [script for script in self._scripts if not script.finished]

    def _step(self, running: list[Script]) -> None:
        spans = assemble(running, self._setting.chunk_tokens, chunked=True)
        waves = run_step(self._runner, self._waves, spans, self._wave, cut=True)
        for _, wave in waves:
            if isinstance(wave.error, KeyboardInterrupt):
                raise wave.error
            if wave.error is not None or wave.failed:
                raise EngineFailedError("a simulated step failed") from wave.error
        for span in spans:
            span.request.n_past = span.stop
        self._n_steps += 1
        self._n_two += len(waves) == 2
        self._n_decoded += len(spans)
        dense_bytes = sum(self._dense_read(wave.n_context) for _, wave in waves)
        self._dense_bytes += dense_bytes
        self._chain.step(len(waves), dense_bytes)

    def _wave(self, spans: Sequence[RowSpan[Script]], number: int) -> ScriptWave:
        return ScriptWave(spans, self._n_experts, self._chain.layer)

    def _dense_read(self, n_context: int) -> int:
        """Return the bytes that the GPU reads besides experts for a wave with this past, without embeddings."""
        shape = self._setting.shape
        weights = shape.resident_bytes - (0 if shape.tied else shape.head_bytes)
        return weights + n_context * (shape.n_layers + shape.n_dense_layers) * shape.kv_bytes_per_token

    def _mark(self) -> _Mark:
        decided, lanes = self._scheduler.counters, self._lanes
        return _Mark(
            lanes.now_s(),
            dict(lanes.busy_s),
            dict(lanes.read_bytes),
            decided.n_hits,
            decided.n_cpu,
            decided.n_fetches,
            decided.n_promotions,
        )

    def _report(self, first: _Mark, last: _Mark) -> Report:
        decode_s = last.at_s - first.at_s
        read = {lane: last.read_bytes[lane] - first.read_bytes[lane] for lane in LANES}
        busy = {lane: last.busy_s[lane] - first.busy_s[lane] for lane in LANES}
        bound = self._bound(read, busy["link"])
        return Report(
            preload_s=self._began_s,
            first_token_s=first.at_s - self._began_s,
            decode_s=decode_s,
            n_decoded=self._n_decoded,
            utilisation={lane: seconds / decode_s if decode_s else 0.0 for lane, seconds in busy.items()},
            read_bytes=read,
            bound=bound,
            chain_s=max(self._chain.seconds, bound.seconds),
            n_hits=last.hits - first.hits,
            n_cpu=last.cpu - first.cpu,
            n_fetches=last.fetches - first.fetches,
            n_promotions=last.promotions - first.promotions,
            prefetch=self._scheduler.prefetched,
            prediction_error=self._scheduler.counters.median_error(),
            n_steps=self._n_steps,
            n_steps_in_two_waves=self._n_two,
            trace=self._trace,
        )

    def _bound(self, read: dict[LaneName, int], link_s: float) -> Bound:
        machine = self._setting.machine
        return Bound(
            read["cpu"] / machine.cpu_read_bytes_per_s,
            # A promotion counts when it starts, and may still be under way at the end: no more than was moved.
            min(read["link"] / machine.link_bytes_per_s, link_s),
            (read["gpu"] + self._dense_bytes) / machine.gpu_read_bytes_per_s,
        )
