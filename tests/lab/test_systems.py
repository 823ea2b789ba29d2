"""Systems by name: each does what its authors published, on a small shape, checked after every event."""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import combinations
from typing import Literal, get_args

import pytest

from fiddler.cache import policies
from fiddler.cache.policy import Key
from fiddler.config import EngineConfig, PlannerName, PolicyName, PrefetchMode, WaveMode
from fiddler.errors import ConfigError
from fiddler.lab.machine import Machine
from fiddler.lab.policies import POLICIES, uniform
from fiddler.lab.simulation import Report, Setting, _Simulation
from fiddler.lab.systems import PLANNERS, PREFETCH, SYSTEMS, System, cache_of, planner, prefetch_of, system
from fiddler.recording import Recording, guesses
from fiddler.scheduler import core
from fiddler.scheduler.guesses import Nobody
from fiddler.scheduler.messages import Command, Event
from fiddler.trace import Kind, Span, Trace
from tests.lab.test_simulation import DESKTOP, SMALL, text, visits
from tests.scheduler.desk import Desk

EXPERTS = (SMALL.n_experts,) * SMALL.n_layers
POPULAR: Sequence[Key] = uniform(EXPERTS)[::-1]
EVERY = pytest.mark.parametrize("name", SYSTEMS)
N_SLOTS = 24


class Run:
    """A simulation of one sequence, with what its cache held all the time."""

    def __init__(
        self, placed: System, sequences: list[Recording], *, n_slots: int = N_SLOTS, machine: Machine = DESKTOP
    ) -> None:
        self.trace = Trace()
        setting = Setting(shape=SMALL, machine=machine, n_slots=n_slots, system=placed, popular=POPULAR)
        simulation = _Simulation(setting, sequences, self.trace)
        self.core = simulation._scheduler
        self._handle = self.core.handle
        self.core.handle = self.handle  # type: ignore[method-assign]
        self.always: set[Key] | None = None
        """Experts that were there after every event, once the sequence had come."""
        self.report: Report = simulation.run()

    def handle(self, event: Event, now_s: float) -> list[Command]:
        commands = self._handle(event, now_s)
        self.core.check()
        if self.core.counters.n_layers:
            self.always = self.residents() if self.always is None else self.always & self.residents()
        return commands

    def residents(self) -> set[Key]:
        return {key for key in POPULAR if self.core.cache.slot(key) is not None}

    def spans(self, *kinds: Kind, decoding: bool = False) -> list[Span]:
        since_s = self.report.preload_s + (self.report.first_token_s if decoding else 0.0)
        return [span for span in self.trace.spans if span.kind in kinds and span.start_s >= since_s]


def with_ahead(sequences: list[Recording]) -> list[Recording]:
    return [Recording(s.name, s.n_prompt, s.experts, ahead=guesses(s.experts)) for s in sequences]


@EVERY
def test_every_system_runs_and_counts_each_load_once(name: str) -> None:
    sequences = with_ahead(text(prompt=40))
    run = Run(system(name), sequences)
    report, nbytes = run.report, SMALL.expert_bytes
    assert report.n_hits + report.n_cpu + report.n_fetches == visits(sequences)
    assert report.n_decoded == 23
    assert report.read_bytes["cpu"] == report.n_cpu * nbytes
    assert report.read_bytes["gpu"] == (report.n_hits + report.n_fetches) * nbytes
    assert 0.0 < report.of_bound <= 1.0 + 1e-9


@EVERY
def test_every_system_is_made_of_what_there_is(name: str) -> None:
    placed = SYSTEMS[name]
    assert placed.name == name
    assert planner(placed.planner) is PLANNERS[placed.planner]
    cache = cache_of(placed, N_SLOTS, EXPERTS, SMALL.top_k, POPULAR)
    assert cache.policy.name == placed.policy
    assert isinstance(prefetch_of(placed.prefetch, cache)[0], Nobody) is (placed.prefetch == "off")
    assert placed.waves in get_args(WaveMode)


def test_slots_in_passing_come_out_of_those_given_or_on_top_of_them() -> None:
    def sizes(staging: Literal["none", "some", "layer"], n_slots: int) -> tuple[int, int]:
        cache = cache_of(System(staging=staging), n_slots, EXPERTS, SMALL.top_k)
        return cache.n_slots, cache._staging.n_slots

    n_all = sum(EXPERTS)
    assert sizes("none", 90) == (90, 0)
    assert sizes("some", 90) == (90, 90 // policies.STAGED)
    assert sizes("some", n_all) == (n_all, 0), "where all are resident nobody passes through"
    assert sizes("layer", 90) == (90 + 2 * SMALL.n_experts, 2 * SMALL.n_experts)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"fiddler-2024.*llama\.cpp"):
        system("magic")
    cache = cache_of(System(), 4, EXPERTS, SMALL.top_k)
    with pytest.raises(ConfigError, match=", ".join(PREFETCH)):
        prefetch_of("magic", cache)
    with pytest.raises(ConfigError, match="aged-lfu"):
        cache_of(System(policy="magic"), 4, EXPERTS, SMALL.top_k)


def test_the_options_of_an_engine_are_those_that_there_are() -> None:
    assert set(get_args(PlannerName)) == set(core.PLANNERS) < set(PLANNERS)
    assert set(get_args(PolicyName)) == set(policies.POLICIES) < set(POLICIES)
    assert set(get_args(PrefetchMode)) == set(core.PREFETCH) < set(PREFETCH)
    cache = cache_of(System(), 4, EXPERTS, SMALL.top_k)
    assert [name for name in PREFETCH if isinstance(prefetch_of(name, cache)[0], Nobody)] == ["off"]


def test_the_lab_s_own_system_is_what_an_engine_is_without_options() -> None:
    config, ours = EngineConfig(), System()
    mine = {f.name: getattr(ours, f.name) for f in fields(ours) if hasattr(config, f.name)}
    assert mine == {name: getattr(config, name) for name in mine}
    for n_slots in (0, 90, sum(EXPERTS)):
        cache = policies.make_cache(config.policy, n_slots, EXPERTS, half_life=config.half_life)
        other = cache_of(ours, n_slots, EXPERTS, SMALL.top_k)
        assert type(cache.policy) is type(other.policy)
        for name in ("n_slots", "_admission", "_floor"):
            assert getattr(cache, name) == getattr(other, name)
        assert cache._staging.n_slots == other._staging.n_slots


# What each was published to do


def test_fiddler_2024_never_runs_gpu_and_cpu_at_the_same_time() -> None:
    run = Run(system("fiddler-2024"), text(prompt=200))
    spans = run.spans("cpu", "copy", "slots", "dense")
    assert {span.kind for span in spans} == {"cpu", "copy", "slots", "dense"}
    spans = sorted(run.trace.spans, key=lambda span: span.start_s)
    for one, other in combinations(spans, 2):
        if other.start_s < one.end_s and "cpu" in {one.lane, other.lane}:
            assert one.lane == other.lane, f"{one} beside {other}"
    assert run.report.utilisation["cpu"] + run.report.utilisation["gpu"] <= 1.0 + 1e-9


@pytest.mark.parametrize("name", ["fiddler-2024", "ktransformers"])
def test_the_popular_are_resident_for_ever_and_nobody_else(name: str) -> None:
    run = Run(system(name), text(prompt=600))
    assert run.spans("copy"), "others passed through"
    assert run.always == set(POPULAR[:N_SLOTS])
    passed = run.residents() - set(POPULAR[:N_SLOTS])
    assert len(passed) <= 2 * SMALL.n_experts


def test_fiddler_2024_runs_each_load_where_it_is_cheapest() -> None:
    """On this machine a single row is always cheaper on the CPU than a copy, and dearer than from a slot."""
    run = Run(system("fiddler-2024"), sequences := text())
    resident = set(POPULAR[:N_SLOTS])
    decoded = sequences[0].experts[sequences[0].n_prompt :]
    hits = sum((layer, expert) in resident for token in decoded for layer, es in enumerate(token) for expert in es)
    assert (run.report.n_hits, run.report.n_fetches) == (hits, 0)


def test_llama_cpp_holds_whole_layers_and_copies_nothing() -> None:
    for n_slots in (40, 32):
        run = Run(system("llama.cpp"), text(prompt=600), n_slots=n_slots)
        assert run.always == run.residents() == {(layer, expert) for layer in (0, 1) for expert in range(16)}
        assert not run.spans("copy", "ahead", "promote")
    layers = {span.layer for span in run.spans("slots")}, {span.layer for span in run.spans("cpu")}
    assert layers == ({0, 1}, {2, 3, 4, 5})


def test_all_cpu_leaves_the_gpu_without_experts() -> None:
    run = Run(system("all-cpu"), text(prompt=600))
    assert run.always == set()
    assert not run.spans("slots", "copy", "ahead", "promote")
    assert run.spans("cpu")
    assert run.spans("dense")


@pytest.mark.parametrize("name", ["mixtral-offloading", "all-fetch"])
@pytest.mark.parametrize("n_slots", [0, 4, N_SLOTS])
def test_mixtral_offloading_leaves_the_cpu_without_experts(name: str, n_slots: int) -> None:
    run = Run(system(name), with_ahead(text(2)), n_slots=n_slots)
    assert not run.spans("cpu")
    assert run.report.n_cpu == 0
    assert run.report.n_fetches > 0


def test_mixtral_offloading_copies_two_ahead_at_most_and_keeps_a_quota_of_each_layer() -> None:
    run = Run(system("mixtral-offloading"), with_ahead(text(new=60)))
    use = run.core.prefetcher.use
    assert 0 < use.n_issued <= 2 * SMALL.n_layers * (20 + 60)
    assert use.n_used > 0.5 * use.n_settled
    for layer in range(SMALL.n_layers):
        kept = {key for key in run.residents() if key[0] == layer and key not in run.core.cache._staging.held}
        assert len(kept) == N_SLOTS // SMALL.n_layers


def test_ktransformers_copies_in_long_prompts_and_never_in_decoding() -> None:
    run = Run(system("ktransformers"), text(prompt=600))
    copies = run.spans("copy")
    assert copies
    assert not run.spans("copy", "ahead", "promote", decoding=True)
    assert run.report.read_bytes["link"] == 0
    assert run.report.n_cpu > 0
    assert not Run(system("ktransformers"), text(prompt=100)).spans("copy"), "short prompts run on the CPU"


@pytest.mark.parametrize("link", [0.25, 1.0, 4.0])
def test_freetoken_divides_misses_by_both_rates_wherever_it_runs(link: float) -> None:
    machine = replace(DESKTOP, link_bytes_per_s=DESKTOP.link_bytes_per_s * link)
    run = Run(system("freetoken"), text(), machine=machine)
    costs = run.core.correction.costs
    expert, k = costs.experts[0], costs.contention
    link_rate, cpu_rate = 1.0 / (k.link * expert.copy_s), 1.0 / (k.cpu * expert.cpu(1))
    share = link_rate / (link_rate + cpu_rate)
    for layer in run.trace.decisions:
        assert abs(layer.n_fetch - share * (layer.n_cpu + layer.n_fetch)) <= 0.5 + 1e-6
    assert min(run.report.n_cpu, run.report.n_fetches) > 0


def test_freetoken_streams_prompts() -> None:
    run = Run(system("freetoken"), text(prompt=600))
    decoding = run.spans("cpu", decoding=True)
    assert decoding
    assert run.spans("cpu") == decoding, "in the prompt the CPU has nothing to do"
    assert len(run.spans("copy")) > len(run.spans("copy", decoding=True))


@pytest.mark.parametrize("order", [(1, 4), (4, 1)])
@pytest.mark.parametrize("policy", ["lru", "layer-lru"])
def test_of_equal_misses_the_one_that_was_visited_last_is_fetched(order: tuple[int, int], policy: str) -> None:
    desk = Desk(n_slots=3, policy=policy)
    for wave, expert in enumerate(order):
        desk.ready(wave, 0, {expert: 1})
    desk.core.planner = planner("bandwidth-split")
    desk.ready(2, 0, {1: 1, 4: 1})
    assert [job.expert for job in desk._copies()] == [order[1]]


def test_hybrimoe_copies_ahead_and_uses_all_three_lanes() -> None:
    run = Run(system("hybrimoe"), with_ahead(text(new=60)))
    assert run.core.prefetcher.use.n_used > 0
    assert run.core.prefetcher.resting == 0
    assert all(run.report.utilisation.values())


def test_hybrimoe_without_prefetch_is_the_same_but_for_that() -> None:
    assert replace(system("hybrimoe"), prefetch="off", name="hybrimoe-no-prefetch") == system(
        "hybrimoe-no-prefetch"
    )
    run = Run(system("hybrimoe-no-prefetch"), with_ahead(text(new=60)))
    assert run.core.prefetcher.use.n_issued == 0
    assert not run.spans("ahead")
    assert all(run.report.utilisation.values())
