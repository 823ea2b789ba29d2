"""Thousands of requests: of any length, and on a machine whose copies and experts fail; all is free after."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from fiddler.cache.cache import ExpertCache
from fiddler.cost.model import Contention, CostModel, Curve, Dense, ExpertCosts, Moves
from fiddler.lab.policies import make_policy
from fiddler.lab.script import Script, ScriptWave
from fiddler.lab.systems import prefetch_of
from fiddler.lanes.runner import Runner
from fiddler.lanes.virtual import VirtualLanes
from fiddler.recording import Recording
from fiddler.scheduler.core import Scheduler
from fiddler.scheduler.layer import Layer
from fiddler.scheduler.messages import CopyExpert, Failures, Job, RunExperts
from fiddler.scheduler.waves import RowSpan, assemble, halves
from tests.support.tiny import save_tiny

N_REQUESTS = 10_000
N_EXPERTS = (8, 8, 8)
N_SLOTS = 6
TOP_K = 2
MAX_RUNNING = 48
MAX_TOKENS = 6
P_COPY_FAILS, P_EXPERT_FAILS, P_LEAVES, P_WAVE_FAILS = 0.05, 0.01, 0.02, 0.05
BROKEN = RuntimeError("broken")
COSTS = CostModel(
    (ExpertCosts(Curve(((1.0, 4e-3),)), Curve(((1.0, 1e-3),)), 3e-3, 1000),) * len(N_EXPERTS),
    Contention(1.2, 1.1),
    Moves(1e-4, 1e-6),
    Dense(Curve(((1.0, 2e-3),)), head=Curve(((1.0, 1e-3),))),
)


class FailingWave(ScriptWave):
    """A wave whose forward raises at a layer."""

    def __init__(self, spans: list[RowSpan[Script]], at: int) -> None:
        super().__init__(spans, N_EXPERTS)
        self._at = at

    def advance(self) -> Layer | None:
        if self._layer + 1 == self._at:
            raise BROKEN
        return super().advance()


class Soak:
    """Serves requests as the engine's loop does, without a model."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.popular = self.numbers.dirichlet(np.full(8, 0.5), size=len(N_EXPERTS))
        cache = ExpertCache(N_SLOTS, N_EXPERTS, make_policy("forecast", N_EXPERTS), n_staging=1)
        self.scheduler = Scheduler(cache, COSTS, ahead=prefetch_of("auto", cache))
        self.lanes = VirtualLanes(COSTS, self.execute)
        self.runner = Runner(self.scheduler, self.lanes)
        self.running: list[Script] = []
        self.ended: Counter[str] = Counter()
        self.failed_rows = 0

    def execute(self, job: Job) -> Failures:
        match job:
            case CopyExpert() if self.rng.random() < P_COPY_FAILS:
                return {job.expert: BROKEN}
            case RunExperts():
                return {load.expert: BROKEN for load in job.loads if self.rng.random() < P_EXPERT_FAILS}
        return {}

    def request(self) -> Script:
        n_tokens = self.rng.randint(1, MAX_TOKENS)
        layers = [self.numbers.choice(8, size=n_tokens * TOP_K, p=p) for p in self.popular]
        routing = np.stack(layers, axis=1).reshape(n_tokens, TOP_K, -1).transpose(0, 2, 1)
        experts = routing.astype(np.int16)
        ahead = np.roll(experts, 1, axis=0)  # guesses that come true where tokens agree
        return Script(Recording("soak", self.rng.randint(1, n_tokens), experts, ahead=ahead))

    def run(self) -> None:
        n_left, n_steps = N_REQUESTS, 0
        while n_left or self.running:
            for _ in range(min(n_left, MAX_RUNNING - len(self.running), self.rng.randint(1, 8))):
                self.running.append(self.request())
                n_left -= 1
            self.end([script for script in self.running if self.rng.random() < P_LEAVES], "left")
            if self.running:
                self.step()
            n_steps += 1
            if n_steps % 50 == 0:
                self.scheduler.check()

    def step(self) -> None:
        spans = assemble(self.running, 32, chunked=True)
        parts = halves(spans, cut=True) if self.rng.random() < 0.5 else [spans]
        cut = len(parts) == 2 and parts[0][-1].request is parts[1][0].request
        waves = [self.wave(part) for part in parts]
        self.runner.run(waves, in_order=cut)
        for wave, part in zip(waves, parts, strict=True):
            scripts = [span.request for span in part if span.request in self.running]
            if wave.error is not None:
                assert wave.error is BROKEN
                self.end(scripts, "failed")
            elif wave.failed:
                self.end(self.concerned(wave, part), "failed")
        for span in spans:
            span.request.n_past = max(span.request.n_past, span.stop)
        self.end([script for script in self.running if script.finished], "finished")

    def wave(self, spans: list[RowSpan[Script]]) -> ScriptWave:
        if self.rng.random() < P_WAVE_FAILS:
            return FailingWave(spans, self.rng.randint(0, len(N_EXPERTS)))
        return ScriptWave(spans, N_EXPERTS)

    def concerned(self, wave: ScriptWave, spans: list[RowSpan[Script]]) -> list[Script]:
        """The requests with rows that visited an expert which failed."""
        found = []
        for span in spans:
            rows = span.request.recording.experts[span.start : span.stop]
            if any(np.isin(rows[:, done.layer.index], [*done.failures]).any() for done in wave.failed):
                found.append(span.request)
        assert found, "experts failed that nobody visited"
        return [script for script in found if script in self.running]

    def end(self, scripts: list[Script], how: str) -> None:
        for script in scripts:
            self.running.remove(script)
            self.ended[how] += 1


@pytest.mark.parametrize("seed", [1])
def test_after_ten_thousand_requests_everything_is_free(seed: int) -> None:
    soak = Soak(seed)
    soak.run()
    soak.runner.settle()
    soak.lanes.close()
    assert soak.ended.total() == N_REQUESTS
    assert min(soak.ended["finished"], soak.ended["left"], soak.ended["failed"]) > 100
    scheduler, cache, counters = soak.scheduler, soak.scheduler.cache, soak.scheduler.counters
    scheduler.check()
    assert scheduler.idle
    assert min(counters.n_hits, counters.n_fetches, counters.n_fallbacks, counters.n_cpu) > 100
    assert cache.n_free + cache.n_ready == N_SLOTS
    assert not cache._slots.leases
    assert not soak.runner._running
    assert not soak.runner._in_lanes
    assert not soak.lanes._jobs
    assert not soak.lanes._began
    assert scheduler.backlog().cpu_s == scheduler.backlog().gpu_s == scheduler.backlog().link_s == 0.0


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize(("kind", "n_requests", "longest"), [("qwen3_moe", 3000, 40), ("gpt_oss", 600, 400)])
def test_memory_does_not_grow_with_the_row_counts_seen(
    kind: str, n_requests: int, longest: int, tmp_path: Path
) -> None:
    """Without rooms for the rows, and float32 for gpt-oss's attention, it grows by hundreds of megabytes.

    Where torch multiplies bfloat16 with oneDNN, that is.
    """
    folder = save_tiny(tmp_path / "tiny", kind, dtype=torch.bfloat16, num_hidden_layers=2)
    command = [sys.executable, "-m", "tests.support.loaded_memory", str(folder), str(n_requests), str(longest)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root, check=True)
    warm, *_, last = json.loads(done.stdout)
    assert last - warm < 32  # MB


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_measuring_kernels_leaves_no_memory_behind(tmp_path: Path) -> None:
    """Copies of a matrix, 768 MB of them, stay with the allocator where they are small pieces."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 768, "num_hidden_layers": 1}
    folder = save_tiny(tmp_path / "tiny", "qwen3_moe", dtype=torch.bfloat16, **sizes)
    command = [sys.executable, "-m", "tests.support.opened_memory", str(folder), str(tmp_path / "empty")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, check=True)
    unmeasured, measured = json.loads(done.stdout)
    assert measured - unmeasured < 100  # MB
