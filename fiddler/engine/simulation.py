"""A run of sequences on a simulated machine in virtual time, from routing alone: no model, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import make_policy
from fiddler.config import WaveMode
from fiddler.cost.lanes import LANES, LaneName
from fiddler.cost.machine import Machine, cost_model
from fiddler.cost.shape import ModelShape
from fiddler.engine.assemble import assemble, halves
from fiddler.engine.runner import Runner
from fiddler.engine.script import Routing, Script, ScriptWave
from fiddler.lanes.virtual import VirtualLanes
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.planners import planner
from fiddler.scheduler.waves import Waves
from fiddler.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is simulated: a model's shape on a machine, and how its experts are placed."""

    shape: ModelShape
    machine: Machine
    n_slots: int
    policy: str = "aged-lfu"
    planner: str = "auto"
    half_life: float = 32.0
    promote: bool = True
    waves: WaveMode = "auto"
    chunk_tokens: int = 512


@dataclass(frozen=True, slots=True)
class Bound:
    """What no schedule of the same bytes can beat: the longest of three reads, each at its full rate.

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


@dataclass(frozen=True, slots=True)
class Report:
    """What a run took. Seconds are virtual."""

    first_token_s: float
    """Until every sequence has its first token."""
    decode_s: float
    """From then on."""
    n_decoded: int
    """Tokens made in that time."""
    utilisation: dict[LaneName, float]
    """Share of the decoding time each lane was busy."""
    read_bytes: dict[LaneName, int]
    """Bytes of experts each lane computed with, or copied, while decoding."""
    bound: Bound
    """Of the decoding."""
    n_hits: int
    n_cpu: int
    n_fetches: int
    n_promotions: int
    prediction_error: float
    """Median of `|predicted / measured - 1|` of the layers' makespans."""
    n_steps_in_two_waves: int
    trace: Trace | None = field(default=None, compare=False)

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, over all sequences."""
        return self.n_decoded / self.decode_s if self.decode_s else 0.0

    @property
    def of_bound(self) -> float:
        """The bound's share of the time taken: 1.0 is as fast as its bytes allow."""
        return self.bound.seconds / self.decode_s if self.decode_s else 0.0


def simulate(setting: Setting, sequences: Sequence[tuple[Routing, int]], *, trace: Trace | None = None) -> Report:
    """Run sequences, each a routing `[T, L, K]` and the length of its prompt, side by side to their ends."""
    return anyio.run(_Simulation(setting, sequences, trace).run)


@dataclass(frozen=True, slots=True)
class _Mark:
    """The state of the machine at one moment."""

    at_s: float
    busy_s: dict[LaneName, float]
    read_bytes: dict[LaneName, int]
    hits: int
    cpu: int
    fetches: int
    promotions: int


class _Simulation:
    def __init__(self, setting: Setting, sequences: Sequence[tuple[Routing, int]], trace: Trace | None) -> None:
        shape = setting.shape
        costs = cost_model(shape, setting.machine)
        self._setting = setting
        self._n_experts = (shape.n_experts,) * shape.n_layers
        policy = make_policy(setting.policy, self._n_experts, half_life=setting.half_life, top_k=shape.top_k)
        cache = ExpertCache(setting.n_slots, self._n_experts, policy)
        self._trace = trace
        self._scheduler = Scheduler(
            cache, costs, planner=planner(setting.planner), promote=setting.promote, trace=trace
        )
        self._lanes = VirtualLanes(costs, trace=trace)
        self._runner = Runner(self._scheduler, self._lanes)
        self._waves = Waves(setting.waves, self._scheduler, shape.top_k)
        self._scripts = [Script(routing, n_prompt) for routing, n_prompt in sequences]
        self._dense_bytes = 0.0
        self._n_two = 0
        self._n_decoded = 0

    async def run(self) -> Report:
        """Run every step."""
        first: _Mark | None = None
        while running := [script for script in self._scripts if not script.finished]:
            if first is None and not any(script.prefilling for script in running):
                first = self._mark()
                self._dense_bytes, self._n_decoded, self._n_two = 0.0, 0, 0
            await self._step(running)
        last = self._mark()
        return self._report(first if first is not None else last, last)

    async def _step(self, running: list[Script]) -> None:
        spans = assemble(running, self._setting.chunk_tokens, chunked=True)
        n_rows, n_context = sum(s.n_rows for s in spans), sum(s.stop for s in spans)
        parts = halves(spans, cut=True) if self._waves.choose(n_rows, n_context) == 2 else [spans]
        cut = len(parts) == 2 and parts[0][-1].request is parts[1][0].request
        started_s = self._lanes.now_s()
        await self._runner.run([ScriptWave(part, self._n_experts) for part in parts], in_order=cut)
        self._waves.took(len(parts), self._lanes.now_s() - started_s)
        for span in spans:
            span.request.n_past = span.stop
        self._n_two += len(parts) == 2
        self._n_decoded += len(spans)
        shape = self._setting.shape
        layers = shape.n_layers + shape.n_dense_layers
        self._dense_bytes += len(parts) * shape.resident_bytes + n_context * layers * shape.kv_bytes_per_token

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
        machine = self._setting.machine
        return Report(
            first_token_s=first.at_s,
            decode_s=decode_s,
            n_decoded=self._n_decoded,
            utilisation={lane: seconds / decode_s if decode_s else 0.0 for lane, seconds in busy.items()},
            read_bytes=read,
            bound=Bound(
                read["cpu"] / machine.cpu_read_bytes_per_s,
                read["link"] / machine.link_bytes_per_s,
                (read["gpu"] + self._dense_bytes) / machine.gpu_read_bytes_per_s,
            ),
            n_hits=last.hits - first.hits,
            n_cpu=last.cpu - first.cpu,
            n_fetches=last.fetches - first.fetches,
            n_promotions=last.promotions - first.promotions,
            prediction_error=self._scheduler.counters.median_error(),
            n_steps_in_two_waves=self._n_two,
            trace=self._trace,
        )
