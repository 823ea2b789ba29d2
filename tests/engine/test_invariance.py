"""Where an expert runs shows in no bit: the same rows in a wave give the same logits on every placement.

Every run of a test has the same rows in each wave, so `waves="one"` is compared with itself, and `"two"` with
itself: the number of rows an expert gets at once may change last bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, get_args
from unittest.mock import patch

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler import DEMO, ConfigError, Engine, EngineConfig
from fiddler.config import PolicyName, WaveMode
from fiddler.cost.model import Contention, CostModel, Curve, Dense, ExpertCosts, Moves
from fiddler.devices.cpu import CpuDevice
from fiddler.devices.formula import ExpertFormula
from fiddler.devices.kernels import TORCH, KernelName, Kernels, Matmul, rows_last, shape_key
from fiddler.engine.assembly import DEFER_FROM, assemble_rig
from fiddler.models.kv import Directness, SequenceKV, WaveCache
from fiddler.scheduler.routing import Load
from fiddler.store.layout import BlockLayout
from fiddler.types import ExpertWeights
from tests.architectures import build
from tests.architectures.overrides import OVERRIDES
from tests.support.covering import covering
from tests.support.placement import Placement, Script, Subject, Visit, jittered, run, shuffled
from tests.support.tiny import save_tiny

PACKED = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "glm4_moe", "gemma4 with shared keys")
SINGLE = ("jamba", "qwen3_next")
MACHINES = ("fiddler-env1", "rtx4090-desktop", "h100-server")
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
WAVES: tuple[WaveMode, ...] = ("one", "two")
FOREVER = 99


def _build(name: str) -> Any:
    if name != "gemma4 with shared keys":
        return build(name)
    layers = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    with patch.dict(OVERRIDES["gemma4"], layers):
        return build("gemma4")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    opened: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in opened:
            folder = DEMO if name == "demo" else tmp_path_factory.mktemp("subject")
            if name == "many":
                save_tiny(folder, num_experts=12, num_experts_per_tok=DEFER_FROM)
            elif name != "demo":
                _build(name).save_pretrained(folder)
            opened[name] = Subject.open(folder)
        return opened[name]

    return get


def ids(n: int, seed: int) -> tuple[int, ...]:
    random = Random(seed)
    return tuple(random.randrange(1, 180) for _ in range(n))


def uneven(n_layers: int, *, cpu_s: float = 3e-5, gpu_s: float = 1e-5, copy_s: float = 4e-5) -> CostModel:
    """Return costs at which an expert is worth having in a slot, and sometimes worth fetching."""
    cpu, gpu = Curve(((1.0, cpu_s), (9.0, 8 * cpu_s))), Curve(((1.0, gpu_s), (9.0, 2 * gpu_s)))
    experts = (ExpertCosts(cpu, gpu, copy_s, nbytes=1),) * n_layers
    return CostModel(experts, Contention(1.5, 1.2), Moves(1e-6, 1e-7), Dense(Curve(((1.0, 1e-5),))), 1e-6)


RAGGED = Script(
    (
        Visit(ids(15, 1), n_prompt=11, joins=0, leaves=FOREVER),
        Visit(ids(5, 2), n_prompt=1, joins=0, leaves=FOREVER),
        Visit(ids(9, 3), n_prompt=8, joins=1, leaves=3),
        Visit(ids(10, 4), n_prompt=7, joins=2, leaves=FOREVER),
    ),
    chunk_tokens=6,
)
"""Four sequences: one joins and leaves half done, one joins when others decode; a long prompt takes many steps."""


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    visits = []
    for _ in range(draw(st.integers(1, 4))):
        n_prompt, n_more = draw(st.integers(1, 12)), draw(st.integers(0, 4))
        joins = draw(st.integers(0, 3))
        leaves = draw(st.sampled_from((FOREVER, FOREVER, joins + 1, joins + 3)))
        text = ids(n_prompt + n_more, draw(st.integers(0, 999)))
        visits.append(Visit(text, n_prompt, joins, leaves))
    return Script(tuple(visits), draw(st.sampled_from((3, 5, 8, 64))))


@dataclass(frozen=True)
class Choice:
    """A placement of no model in particular."""

    options: dict[str, Any]
    slots: float
    """A number of slots, or below 1 a share of all experts."""
    costs: dict[str, float]
    machine: str
    order: str
    seed: int

    def of(self, subject: Subject, waves: WaveMode) -> Placement:
        options = {**self.options, "waves": waves}
        costs = uneven(len(subject.mapped.n_experts), **self.costs)
        if self.machine == "cpu":
            return Placement(EngineConfig(**options))
        n_slots = round(self.slots * subject.n_experts) if self.slots <= 1 else int(self.slots)
        config = EngineConfig(device=self.machine, slots=n_slots, **(options | {"store": "auto"}))
        if self.machine != "sim":
            return Placement(config)
        lanes = {"own": None, "jittered": partial(jittered, self.seed), "shuffled": partial(shuffled, self.seed)}
        return Placement(config, costs, lanes[self.order])


seconds = st.sampled_from((1e-6, 1e-5, 1e-4, 1e-3))
choices = st.builds(
    Choice,
    options=st.fixed_dictionaries(
        {
            "policy": st.sampled_from(POLICIES),
            "planner": st.sampled_from(("auto", "auto", "all-cpu", "all-fetch")),
            "promote": st.booleans(),
            "half_life": st.sampled_from((1.0, 32.0)),
            "store": st.sampled_from(("mapped", "packed")),
        }
    ),
    slots=st.sampled_from((0, 0.04, 2, 3, 0.25, 0.5, 1)),
    costs=st.fixed_dictionaries({"cpu_s": seconds, "gpu_s": seconds, "copy_s": seconds}),
    machine=st.sampled_from(("cpu", "sim", "sim", "sim", *(f"sim:{name}" for name in MACHINES))),
    order=st.sampled_from(("own", "jittered", "shuffled", "shuffled")),
    seed=st.integers(0, 9999),
)


@pytest.mark.parametrize("name", ["demo", *PACKED, *SINGLE])
def test_logits_are_those_of_the_plain_cpu(name: str, subjects: Callable[[str], Subject]) -> None:
    subject = subjects(name)
    assert subject.mapped.packed == (name not in SINGLE)

    @given(scripts(), st.sampled_from(WAVES), st.lists(choices, min_size=3, max_size=3))
    @settings(max_examples=8, deadline=None)
    def compare(script: Script, waves: WaveMode, placements: list[Choice]) -> None:
        reference = run(subject, script, Placement(EngineConfig(waves=waves)))
        for choice in placements:
            placement = choice.of(subject, waves)
            assert not run(subject, script, placement).differs_from(reference), placement

    compare()


ALONE: list[dict[str, Any]] = [
    *({"slots": n} for n in (0, 1, 5, 32)),
    *({"policy": policy} for policy in POLICIES),
    *({"planner": planner} for planner in ("auto", "all-cpu", "all-fetch")),
    *({"promote": promote} for promote in (False, True)),
]


DEVICES = ("sim", *(f"sim:{name}" for name in MACHINES))
SETTINGS = covering(DEVICES, WAVES, ALONE)


@pytest.mark.parametrize("device", DEVICES)
def test_every_option_by_itself_changes_no_bit(device: str, subjects: Callable[[str], Subject]) -> None:
    subject = subjects("mixtral")
    references = {waves: run(subject, RAGGED, Placement(EngineConfig(waves=waves))) for waves in WAVES}
    costs = uneven(len(subject.mapped.n_experts)) if device == "sim" else None
    for waves, options in [(waves, options) for on, waves, options in SETTINGS if on == device]:
        config = EngineConfig(device=device, waves=waves, **({"slots": 12} | options))
        assert not run(subject, RAGGED, Placement(config, costs)).differs_from(references[waves]), config


@pytest.mark.parametrize("waves", WAVES)
def test_the_order_in_which_lanes_report_changes_no_bit(
    waves: WaveMode, subjects: Callable[[str], Subject]
) -> None:
    subject = subjects("deepseek_v3")
    reference = run(subject, RAGGED, Placement(EngineConfig(waves=waves)))
    config = EngineConfig(device="sim", waves=waves, slots=12)
    costs = uneven(len(subject.mapped.n_experts))
    for seed in range(16):
        placement = Placement(config, costs, partial(shuffled, seed))
        assert not run(subject, RAGGED, placement).differs_from(reference), seed


@pytest.mark.parametrize("waves", WAVES)
def test_the_placements_that_are_compared_differ(waves: WaveMode, subjects: Callable[[str], Subject]) -> None:
    """Otherwise all of this would prove nothing."""
    subject = subjects("mixtral")

    def loads(device: str, **options: Any) -> tuple[int, int, int]:
        config = EngineConfig(device=device, waves=waves, **options)
        played = run(subject, RAGGED, Placement(config, uneven(4)))
        counters = played.rig.side.work.counters
        return counters["cpu"].n_loads, counters["gpu"].n_loads, counters["link"].n_loads

    on_cpu, on_gpu, copied = loads("cpu")
    assert (on_gpu, copied) == (0, 0)
    assert loads("sim:fiddler-env1", slots=32, planner="all-fetch", promote=False, prefetch="off")[:2] == (
        0,
        on_cpu,
    )
    assert loads("sim:fiddler-env1", slots=12, planner="all-cpu", promote=False, prefetch="off") == (on_cpu, 0, 0)
    some = loads("sim:fiddler-env1", slots=12, promote=True)
    assert all(some)
    assert some[0] + some[1] == on_cpu


@pytest.mark.parametrize("policy", POLICIES)
def test_a_warm_start_changes_no_bit(
    policy: PolicyName, subjects: Callable[[str], Subject], tmp_path: Path
) -> None:
    subject = subjects("qwen3_moe")
    reference = run(subject, RAGGED)
    config = EngineConfig(
        device="sim:rtx4090-desktop", waves="one", slots=6, policy=policy, warm_start=tmp_path / "scores.json"
    )
    for _ in range(2):
        assert not run(subject, RAGGED, Placement(config, uneven(4))).differs_from(reference)
        assert (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("name", [*PACKED, *SINGLE])
def test_two_waves_differ_from_one_by_rounding(name: str, subjects: Callable[[str], Subject]) -> None:
    one = run(subjects(name), RAGGED)
    two = run(subjects(name), RAGGED, Placement(EngineConfig(waves="two")))
    assert one.logits.keys() == two.logits.keys()
    for key, logits in one.logits.items():
        torch.testing.assert_close(two.logits[key], logits, rtol=1e-3, atol=1e-3)


def test_the_wave_in_front_does_not_see_the_rows_of_the_wave_behind() -> None:
    """A layer that shares an earlier one's keys runs when the wave behind has added its own to them already."""
    past, directness = SequenceKV(), Directness()
    front, behind = (WaveCache([past], [3], directness, n_seen) for n_seen in (0, 3))
    keys, values = front.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    both, _ = behind.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    ((shared, _),) = front.pasts(keys, values, 1)
    assert torch.equal(shared, keys)
    ((seen, _),) = behind.pasts(both, both, 1)
    assert seen.shape[2] == 6


# Deferral


@pytest.mark.parametrize("waves", WAVES)
@pytest.mark.parametrize("n_deferred", [1, 2, 5])
def test_deferral_changes_the_result_and_its_placement_does_not(
    n_deferred: int, waves: WaveMode, subjects: Callable[[str], Subject]
) -> None:
    subject = subjects("many")
    exact = run(subject, RAGGED, Placement(EngineConfig(waves=waves)))
    reference = run(subject, RAGGED, Placement(EngineConfig(waves=waves, defer=n_deferred)))
    assert reference.differs_from(exact)
    assert all(torch.isfinite(logits).all() for logits in reference.logits.values())

    @given(choices)
    @settings(max_examples=6, deadline=None)
    def compare(choice: Choice) -> None:
        drawn = choice.of(subject, waves)
        placement = replace(drawn, config=replace(drawn.config, defer=n_deferred))
        assert not run(subject, RAGGED, placement).differs_from(reference), placement

    compare()


@pytest.mark.parametrize("top_k", range(1, DEFER_FROM + 1))
def test_deferral_needs_six_experts_a_token(top_k: int, subjects: Callable[[str], Subject]) -> None:
    subject = subjects("many")
    loaded = replace(subject.mapped, top_k=top_k)
    if top_k == DEFER_FROM:
        assemble_rig(loaded, subject.kernels, EngineConfig(defer=1))
        return
    with pytest.raises(ConfigError, match=f"this one has {top_k}: set defer=0"):
        assemble_rig(loaded, subject.kernels, EngineConfig(defer=1))
    assemble_rig(loaded, subject.kernels, EngineConfig(defer=0))


def test_an_engine_refuses_deferral_for_a_model_of_few_experts() -> None:
    async def opened() -> None:
        async with Engine(DEMO, EngineConfig(defer=1)):
            pass

    with pytest.raises(ConfigError, match="at least 6 experts a token"):
        anyio.run(opened)


# Through the front door


async def completions(config: EngineConfig) -> list[tuple[tuple[int, ...], tuple[float, ...] | None]]:
    """Return the tokens and log-probabilities of requests that come one after the other."""
    made = []
    async with Engine(DEMO, config) as engine:
        for seed, prompt in enumerate(("Once upon a time", [5, 6, 7] * 4)):
            result = await engine.generate(prompt, max_new_tokens=6, do_sample=bool(seed), seed=seed, logprobs=True)
            made.append((result.token_ids, result.logprobs))
    return made


def test_an_engine_gives_the_same_tokens_and_logprobs_on_every_device(tmp_path: Path) -> None:
    chunked = EngineConfig(chunk_tokens=5, waves="one", warm_start=tmp_path / "scores.json")
    reference = anyio.run(completions, chunked)
    assert all(logprobs is not None for _, logprobs in reference)
    others: list[dict[str, Any]] = [
        {"store": "packed"},
        {"device": "sim"},
        {"device": "sim", "slots": 3, "planner": "all-fetch", "policy": "lru", "trace": True},
        *({"device": f"sim:{machine}", "slots": n} for machine, n in zip(MACHINES, (0, 10, 96), strict=True)),
        {"device": "sim:rtx4090-desktop", "policy": "lfu", "promote": False},
    ]
    for options in others:
        scores = tmp_path / f"{options.get('policy', 'scores')}.json"
        assert anyio.run(completions, replace(chunked, warm_start=scores, **options)) == reference, options


# What the stores differ in


@pytest.mark.parametrize("name", list(TORCH))
def test_a_matrix_with_gaps_gives_the_bits_of_its_block(name: KernelName) -> None:
    """gpt-oss interleaves gate and up: mapped ones have gaps, and their blocks have none."""
    generator = torch.Generator().manual_seed(0)
    fused, x = torch.randn(64, 96, generator=generator), torch.randn(1, 64, generator=generator)
    mapped = fused.t()[::2]
    weights = ExpertWeights(up=(mapped,), down=torch.eye(64))
    layout = BlockLayout.of(weights)
    block = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.write(weights, block)
    packed = layout.views(block).up[0]
    assert torch.equal(packed, mapped)
    assert packed.stride() != mapped.stride()
    assert torch.equal(TORCH[name](x, packed, None), TORCH[name](x, mapped, None))


def test_an_expert_whose_gate_and_up_lie_apart_takes_the_kernel_of_its_layer() -> None:
    """A shard may end between the two in one expert; then no other expert's kernel may hang on who came first."""
    up, down = torch.ones(64, 32), torch.ones(32, 32)
    joined, apart = ExpertWeights(up=(up,), down=down), ExpertWeights(up=tuple(up.chunk(2)), down=down)
    kernels = Kernels({(shape_key(up), 4): "rows_last"})
    formula = ExpertFormula(gated=True, activation=torch.nn.functional.silu)

    def picked(*order: int) -> list[Matmul]:
        device = CpuDevice(lambda _, expert: (joined, apart)[expert], (formula,), kernels)
        ups: list[Matmul] = []

        def spy(_formula: Any, _weights: Any, rows: torch.Tensor, up: Matmul, _down: Any) -> torch.Tensor:
            ups.append(up)
            return rows

        with patch("fiddler.devices.cpu.run_expert", spy):
            loads = [Load(expert, 4 * i, 4 * i + 4) for i, expert in enumerate(order)]
            own = [device.weights(0, expert) for expert in order]
            device.run(0, loads, own, torch.ones(8, 32), torch.empty(8, 32))
        return ups

    assert picked(0, 1) == picked(1, 0) == [rows_last, rows_last]
