"""An engine on a GPU whose streams run late: logits are those of the CPU, bit by bit, in whatever order it works.

All of the real path runs, but for CUDA itself and Triton: what is only ordered by luck shows here.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, get_args
from unittest.mock import DEFAULT, Mock, patch

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fiddler import Engine
from fiddler.config import EngineConfig, PolicyName, PrefetchMode, WaveMode
from fiddler.devices.formula import gated
from fiddler.devices.kernels import Kernels
from fiddler.gpu import cuda
from fiddler.gpu.slots import SlotExperts
from fiddler.gpu.visits import Visits
from fiddler.steps import graphs
from fiddler.types import Statistics
from tests.engine.test_invariance import RAGGED, ids, scripts, uneven
from tests.support.fake_gpu import FakeGpu
from tests.support.placement import Placement, Played, Script, Subject, Visit, run
from tests.support.tiny import save_tiny

ARCHITECTURES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe")


@pytest.fixture(autouse=True)
def _kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recordings be there to be looked at when an engine has closed."""
    monkeypatch.setattr(graphs.Graphs, "forget", lambda self: None)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    @cache
    def get(name: str) -> Subject:
        folder = tmp_path_factory.mktemp(name)
        # torch's own matmul everywhere: the fake's slots have no other.
        return Subject.open(save_tiny(folder, name), Kernels())

    return get


def on_gpu(gpu: FakeGpu, slots: int, **options: Any) -> Placement:
    """Without graphs unless asked for: attention over a bucket of tokens has other last bits."""
    config = EngineConfig(device="cuda", slots=slots, kv_tokens=256, **({"graphs": False} | options))
    return Placement(config, uneven(3, copy_s=1e-5), gpu=gpu)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("slots", [0, 5, 24])
def test_logits_are_those_of_the_cpu(subject: Callable[[str], Subject], name: str, slots: int) -> None:
    model = subject(name)
    plain = run(model, RAGGED)
    played = run(model, RAGGED, on_gpu(FakeGpu(slots), slots, waves="one"))
    assert not played.differs_from(plain)
    counters = played.rig.side.work.counters
    assert bool(slots) == bool(counters["gpu"].n_loads)
    assert (counters["cpu"].n_loads > 0) or slots == 24


@settings(max_examples=60, deadline=None)
@given(
    script=scripts(),
    seed=st.integers(0, 1 << 30),
    slots=st.sampled_from((0, 1, 2, 4, 7, 24)),
    pinnable=st.sampled_from((0, 40_000, float("inf"))),
    options=st.fixed_dictionaries(
        {
            "planner": st.sampled_from(("auto", "auto", "all-cpu", "all-fetch")),
            "policy": st.sampled_from(get_args(PolicyName)),
            "prefetch": st.sampled_from(get_args(PrefetchMode)),
            "promote": st.booleans(),
            "waves": st.sampled_from(("one", "two")),
            "trace": st.booleans(),
        }
    ),
)
def test_no_order_that_the_streams_allow_changes_a_bit(
    subject: Callable[[str], Subject],
    script: Script,
    seed: int,
    slots: int,
    pinnable: float,
    options: dict[str, Any],
) -> None:
    model = subject("qwen3_moe")
    plain = run(model, script, Placement(EngineConfig(waves=options["waves"])))
    played = run(model, script, on_gpu(FakeGpu(seed, pinnable=pinnable), slots, **options))
    assert not played.differs_from(plain)
    assert not played.rig.scheduler.dead


def test_deferred_experts_join_one_layer_late(tmp_path: Path) -> None:
    model = Subject.open(save_tiny(tmp_path, num_experts=12, num_experts_per_tok=6), Kernels())
    plain = run(model, RAGGED, Placement(EngineConfig(defer=2, waves="one")))
    for seed in range(4):
        played = run(model, RAGGED, on_gpu(FakeGpu(seed), 7, defer=2, waves="one"))
        assert not played.differs_from(plain)


def close(played: Played, plain: Played) -> bool:
    """Whether two runs pick the same tokens, from logits that differ by rounding alone."""
    assert played.logits.keys() == plain.logits.keys()
    return all(
        torch.allclose(logits, plain.logits[at], atol=1e-4) and logits.argmax() == plain.logits[at].argmax()
        for at, logits in played.logits.items()
    )


LONG = Script(
    (
        Visit(ids(30, 1), n_prompt=4, joins=0, leaves=1000),
        Visit(ids(24, 2), n_prompt=3, joins=0, leaves=18),
        Visit(ids(12, 3), n_prompt=2, joins=5, leaves=1000),
        Visit(ids(22, 4), n_prompt=9, joins=8, leaves=1000),
    ),
    chunk_tokens=16,
)
"""Mostly decoding: rows come and go, and the longest past passes several buckets."""


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("waves", ["one", "two"])
def test_recorded_steps_give_the_same_tokens(
    subject: Callable[[str], Subject], name: str, waves: WaveMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 4)
    model = subject(name)
    plain = run(model, LONG, Placement(EngineConfig(waves=waves)))
    gpu = FakeGpu(7)
    played = run(model, LONG, on_gpu(gpu, 7, graphs=True, waves=waves))
    assert close(played, plain)
    recorded = played.rig.steps.graphs
    assert recorded is not None
    assert not recorded.why_not
    kinds = [kind for kind, known in recorded.kinds.items() if known is not None]
    assert gpu.n_graphs == 4 * len(kinds)  # one more piece than layers
    assert {kind[0] for kind in kinds} == ({0} if waves == "one" else {0, 1})
    assert len({kind[1] for kind in kinds}) > 1
    assert len({kind[2] for kind in kinds}) > 1
    assert len({id(pool) for pool in recorded.pools.values()}) == len(recorded.pools) > 0


def test_a_prompt_of_one_token_is_no_recorded_step(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 8)
    model = subject("mixtral")
    visits = [Visit(ids(12, seed), n_prompt=3, joins=0, leaves=1000) for seed in (1, 2)]
    late = Visit(ids(20, 3), n_prompt=1, joins=12, leaves=1000)
    script = Script((*visits[:1], late), chunk_tokens=16)
    plain = run(model, script, Placement(EngineConfig(waves="one")))
    assert close(run(model, script, on_gpu(FakeGpu(2), 7, graphs=True, waves="one")), plain)


def test_a_past_without_numbers_stays_its_sequence_s_own(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 4)
    model, damaged = subject("mixtral"), 190
    first, second, *others = LONG.visits
    assert not any(damaged in visit.ids for visit in LONG.visits)
    second = replace(second, ids=(damaged, *second.ids[1:]))
    script = replace(LONG, visits=(first, second, *others))
    plain = run(model, script, Placement(EngineConfig(waves="one")))
    embeddings: Any = model.packed.model.get_input_embeddings()
    row = embeddings.weight[damaged].clone()
    with torch.no_grad():
        try:
            embeddings.weight[damaged] = torch.nan
            played = run(model, script, on_gpu(FakeGpu(7), 7, graphs=True, waves="one"))
        finally:
            embeddings.weight[damaged] = row
    for (step, visit), logits in played.logits.items():
        if visit == 1:
            assert logits.isnan().all()
        else:
            assert torch.allclose(logits, plain.logits[step, visit], atol=1e-4)


def test_no_model_code_runs_in_a_recorded_step(subject: Callable[[str], Subject]) -> None:
    model, n_calls = subject("qwen3_moe"), list[int]()
    script = Script((Visit(ids(24, 1), n_prompt=4, joins=0, leaves=1000),), chunk_tokens=16)
    hook = model.packed.model.register_forward_hook(lambda *_: n_calls.append(1))
    try:
        run(model, script, on_gpu(FakeGpu(), 5, graphs=True, waves="one"))
    finally:
        hook.remove()
    # what it takes, the prompt, the first step of its kind, and two passes to record it: 20 steps are left
    assert len(n_calls) == 5


def test_what_cannot_be_recorded_runs_all_the_same(
    subject: Callable[[str], Subject], caplog: pytest.LogCaptureFixture
) -> None:
    model = subject("mixtral")
    plain = run(model, LONG, Placement(EngineConfig(waves="one")))
    module = model.packed.model.get_submodule("model.layers.1.input_layernorm")
    hook = module.register_forward_hook(lambda _, __, rows: rows * float(torch.ones(1).sum().item()))
    try:
        played = run(model, LONG, on_gpu(FakeGpu(3), 7, graphs=True, waves="one"))
    finally:
        hook.remove()
    assert close(played, plain)
    assert played.rig.steps.graphs is not None
    assert "not permitted" in played.rig.steps.graphs.why_not
    (record,) = caplog.records
    assert "runs without graphs" in record.message


def test_a_kind_that_there_is_no_memory_for_is_not_tried_again(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 4)
    model, gpu = subject("mixtral"), FakeGpu(3)
    plain = run(model, LONG, Placement(EngineConfig(waves="one")))
    capture = gpu.capture
    first = chain([torch.OutOfMemoryError("no more")], repeat(DEFAULT))
    monkeypatch.setattr(gpu, "capture", Mock(wraps=capture, side_effect=first))
    played = run(model, LONG, on_gpu(gpu, 7, graphs=True, waves="one"))
    assert close(played, plain)
    recorded = played.rig.steps.graphs
    assert recorded is not None
    assert not recorded.why_not
    assert len(recorded.too_large) == 1
    assert any(recorded.kinds.values())
    (record,) = caplog.records
    assert "want of memory" in record.message


def test_one_long_past_among_many_is_not_recorded(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 4)
    monkeypatch.setattr(graphs, "MOST_TOKENS", 16)
    played = run(subject("mixtral"), LONG, on_gpu(FakeGpu(3), 7, graphs=True, waves="one"))
    assert played.rig.steps.graphs is not None
    kinds = played.rig.steps.graphs.kinds
    assert any(kinds.values())
    assert all(kind[1] * kind[2] <= 16 for kind in kinds)


def run_blindly(self: SlotExperts, layer: int, visits: Visits, hidden: Tensor, out: Tensor) -> None:
    """Run experts as the Triton kernel does, on numbers that the host does not know; weights are gathered."""
    stack, rows = self._stacks(layer), torch.arange(visits.n_rows)
    group = torch.searchsorted(visits.bounds.long(), rows, right=True) - 1
    inside = rows < visits.bounds[-1]
    slot = visits.slots.long()[group.clamp(max=len(visits.slots) - 1)]
    positions = visits.positions.long()
    x = hidden[positions // visits.top_k]
    ups = [torch.einsum("ri,roi->ro", x, matrix[slot]) for matrix in stack.up]
    y = torch.einsum("ri,roi->ro", gated(self._formulas[layer], ups), stack.down[slot])
    out.index_copy_(0, positions, torch.where(inside[:, None], y, out[positions]))


def test_with_every_expert_in_a_slot_a_step_is_one_piece(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SlotExperts.run

    def either(self: SlotExperts, layer: int, visits: Visits, hidden: Tensor, out: Tensor) -> None:
        (own if visits.groups else run_blindly)(self, layer, visits, hidden, out)

    monkeypatch.setattr(SlotExperts, "blind", lambda *_: True)
    monkeypatch.setattr(SlotExperts, "run", either)
    model, gpu = subject("qwen3_moe"), FakeGpu(5)
    played = run(model, LONG, on_gpu(gpu, 24, graphs=True, waves="one"))
    plain = run(model, LONG, Placement(EngineConfig(waves="one")))
    assert close(played, plain)
    assert played.rig.steps.graphs is not None
    kinds = [kind for kind, known in played.rig.steps.graphs.kinds.items() if known is not None]
    assert gpu.n_graphs == sum(1 if kind[3] else 4 for kind in kinds)
    assert sum(kind[3] for kind in kinds) > 2
    gone, all_rows = (run.rig.side.work.counters for run in (played, plain))
    assert gone["gpu"].n_rows + gone["cpu"].n_rows == all_rows["cpu"].n_rows


@pytest.mark.parametrize("slots", [1, 8])
def test_memory_that_runs_out_takes_slots_and_no_tokens(tmp_path: Path, slots: int) -> None:
    model, gpu = save_tiny(tmp_path), FakeGpu(1)
    prompt, options = [5, 6, 7, 8, 9], {"max_new_tokens": 12, "do_sample": False}

    async def generate(config: EngineConfig, *, short: bool) -> tuple[list[int], Statistics]:
        async with Engine(model, config) as engine:
            assert engine._loop is not None
            if short:
                run_out(engine._loop._loaded.model, at=6)
            result = await engine.generate(prompt, **options)
            return list(result.token_ids), engine.statistics()

    def run_out(module: torch.nn.Module, at: int) -> None:
        """Let the forward fail once in its last layer, when the others have taken their rows in."""
        calls = count()

        def fail(*_: Any) -> None:
            if next(calls) == at:
                raise torch.OutOfMemoryError("no more")

        module.get_submodule("model.layers.2.self_attn").register_forward_hook(fail)

    expected, _ = anyio.run(partial(generate, EngineConfig(device="cpu"), short=False))
    with patch.object(cuda, "open_gpu", lambda: gpu), patch.object(torch.cuda, "is_available", lambda: True):
        config = EngineConfig(device="cuda", slots=slots, kv_tokens=64, graphs=False)
        tokens, statistics = anyio.run(partial(generate, config, short=True))
    assert tokens == expected
    assert statistics.n_slots == slots - 1
    assert statistics.n_failed == 0
