"""Other systems' plans: by hand, and against each one's published rule, written down here a second time."""

from collections.abc import Mapping
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cost.lanes import Backlog
from fiddler.cost.model import NO_CONTENTION, Contention, CostModel, Curve, ExpertCosts
from fiddler.lab.systems import (
    PLANNERS,
    PROMPT_ROWS,
    STREAM_ROWS,
    bandwidth_split,
    cheapest_each,
    cpu_or_stream,
    planner,
    two_ended,
)
from fiddler.scheduler.plan import Candidate, Plan, Planner, best_cut
from fiddler.scheduler.routing import Load
from tests.scheduler.instances import Instance, instance
from tests.scheduler.oracle import replay

PEERS: Mapping[str, Planner] = {
    "cheapest-each": cheapest_each,
    "two-ended": two_ended,
    "bandwidth-split": bandwidth_split,
    "cpu-or-stream": cpu_or_stream,
}
EACH = pytest.mark.parametrize("name", PEERS)
drawn = st.builds(instance, st.integers(0, 2**32), st.integers(1, 24))


def costs(cpu_s: float, gpu_s: float, copy_s: float, contention: Contention = NO_CONTENTION) -> CostModel:
    """On the CPU by the row, on the GPU all the same."""
    by_row = Curve(((1.0, cpu_s), (2.0, 2 * cpu_s)))
    return CostModel((ExpertCosts(by_row, Curve(((1.0, gpu_s),)), copy_s, nbytes=1),), contention)


def loads(hits: dict[int, int], misses: dict[int, int]) -> list[Candidate]:
    """Candidates from rows by expert."""
    parts = (("hit", hits), ("miss", misses))
    return [Candidate(Load(expert, 0, n), place) for place, rows in parts for expert, n in rows.items()]  # type: ignore[arg-type]


def places(plan: Plan) -> tuple[list[int], list[int], list[int]]:
    """The experts on the CPU, from slots, and fetched in their order."""
    cpu, gpu, fetch = ([load.expert for load in part] for part in (plan.cpu, plan.gpu, plan.fetch))
    return cpu, gpu, fetch


def gpu_side(plan: Plan) -> set[int]:
    return {load.expert for load in (*plan.gpu, *plan.fetch)}


# What all of them keep


@EACH
@given(given=drawn)
def test_every_load_is_in_one_place_and_no_more_is_fetched_than_may_be(name: str, given: Instance) -> None:
    plan = given.plan(PEERS[name])
    place = {c.load.expert: c.place for c in given.candidates}
    assert sorted(chain(*places(plan))) == sorted(place)
    assert len(plan.fetch) <= given.n_fetch
    assert all(place[load.expert] == "miss" for load in plan.fetch)
    assert all(place[load.expert] != "miss" for load in plan.gpu)


@EACH
@given(given=drawn)
def test_its_predicted_time_is_what_lanes_take(name: str, given: Instance) -> None:
    plan = given.plan(PEERS[name])
    assert replay(given, plan) == pytest.approx(plan.predicted_s, rel=1e-9)


@EACH
@given(given=drawn, backlog=st.builds(Backlog, *[st.floats(0.0, 1.0)] * 2))
def test_no_rule_looks_at_what_lanes_have_to_do(name: str, given: Instance, backlog: Backlog) -> None:
    other = PEERS[name](0, given.candidates, given.costs, backlog, given.n_fetch)
    assert places(other)[0] == places(given.plan(PEERS[name]))[0]


@EACH
def test_it_goes_by_its_name(name: str) -> None:
    assert planner(name) is PLANNERS[name] is PEERS[name]


@EACH
def test_nothing_to_divide(name: str) -> None:
    assert PEERS[name](0, [], costs(1.0, 1.0, 1.0), Backlog(), 4) == Plan((), (), (), 0.0)


# Fiddler, 2024: each load where it is cheapest


def test_each_load_runs_where_it_alone_is_cheapest() -> None:
    """7 a row on the CPU, 70 a copy and 5 on the GPU, nearly the published constants: 10 rows are 70, 11 are 77."""
    layer = loads({0: 1, 1: 1, 2: 9}, {3: 10, 4: 11, 5: 40})
    assert places(cheapest_each(0, layer, costs(7.0, 5.0, 70.0), Backlog(), 6)) == ([3], [0, 1, 2], [5, 4])
    assert places(cheapest_each(0, layer, costs(7.0, 8.0, 70.0), Backlog(), 6)) == ([0, 1, 3, 4], [2], [5])
    assert places(cheapest_each(0, layer, costs(7.0, 7.0, 70.0), Backlog(), 6)) == ([0, 1, 3, 4], [2], [5]), "a tie"


def test_where_fewer_may_be_fetched_those_with_most_rows_are() -> None:
    layer = loads({}, {0: 11, 1: 40, 2: 12})
    assert places(cheapest_each(0, layer, costs(7.0, 5.0, 70.0), Backlog(), 2)) == ([0], [], [1, 2])
    assert places(cheapest_each(0, layer, costs(7.0, 5.0, 70.0), Backlog(), 0)) == ([0, 1, 2], [], [])


@given(drawn)
def test_the_sum_of_seconds_is_the_least_there_is(given: Instance) -> None:
    plan = cheapest_each(0, given.candidates, given.costs, given.backlog, len(given.candidates))
    expert = given.costs.experts[0]
    for c in given.candidates:
        options = {
            "cpu": expert.cpu(c.load.n_rows),
            "gpu": expert.gpu(c.load.n_rows) + (expert.copy_s if c.place == "miss" else 0.0),
        }
        side = "gpu" if c.load.expert in gpu_side(plan) else "cpu"
        assert options[side] == min(options.values())


# HybriMoE: the GPU from the head, the CPU from the tail


def test_the_gpu_takes_from_the_head_and_the_cpu_from_the_tail() -> None:
    """By hand, with 4 a row, 2 on the GPU and 3 a copy; the list is hits 1, 0 and misses 2, 4, 3.

    GPU 2 <= CPU 4 takes 1; 4 <= 4 takes 0; of miss 2 the copy ends at 3, before the GPU is free at 4: 6 > 4, so the
    CPU takes 3, being at 4; 6 <= 4 + 8 takes 2; of miss 4 the copy ends at 6: 8 <= 12 takes it.
    """
    layer = loads({0: 1, 1: 3}, {2: 9, 3: 1, 4: 2})
    assert places(two_ended(0, layer, costs(4.0, 2.0, 3.0), Backlog(), 5)) == ([3], [0, 1], [2, 4])


def test_where_no_more_may_be_fetched_the_cpu_takes_what_is_left() -> None:
    layer = loads({0: 1}, {1: 5, 2: 4, 3: 3})
    assert places(two_ended(0, layer, costs(4.0, 0.1, 0.1), Backlog(), 1)) == ([2, 3], [0], [1])
    assert places(two_ended(0, layer, costs(4.0, 0.1, 0.1), Backlog(), 0)) == ([1, 2, 3], [0], [])


def by_the_paper(given: Instance) -> set[int]:
    """The experts of the GPU; list = cached by rows descending, then uncached by rows descending.

    t_g = g(n_head) (+ max(0, T_mv + m - T_gpu) if uncached), t_c = c(n_tail); if T_gpu + t_g <= T_cpu + t_c the
    head goes to the GPU (and T_mv += m if uncached), else the tail to the CPU. What cannot be copied any more goes
    to the CPU; what is on its way is cached once it has landed, and T_mv begins when all of that has.
    """
    expert, left = given.costs.experts[0], list(given.candidates)
    left.sort(key=lambda c: (c.place == "miss", -c.load.n_rows, -c.score, c.load.expert))
    t_gpu = t_cpu = 0.0
    t_mv = max([c.ahead_s for c in left], default=0.0)
    gpu: set[int] = set()
    n_copied = 0
    while left:
        uncached = left[0].place == "miss"
        t_g = expert.gpu(left[0].load.n_rows)
        if uncached:
            t_g += max(0.0, t_mv + expert.copy_s - t_gpu)
        else:
            t_g += max(0.0, left[0].ahead_s - t_gpu)
        t_c = expert.cpu(left[-1].load.n_rows)
        if (uncached and n_copied == given.n_fetch) or t_gpu + t_g > t_cpu + t_c:
            t_cpu += t_c
            del left[-1]
        else:
            gpu.add(left[0].load.expert)
            t_gpu += t_g
            t_mv += expert.copy_s if uncached else 0.0
            n_copied += uncached
            del left[0]
    return gpu


@given(drawn)
def test_head_and_tail_are_taken_as_the_paper_says(given: Instance) -> None:
    plan = given.plan(two_ended)
    assert gpu_side(plan) == by_the_paper(given)
    rows = [load.n_rows for load in plan.fetch]
    assert rows == sorted(rows, reverse=True)


# FreeToken: the misses divided by bandwidth


@pytest.mark.parametrize(("cpu_s", "n_fetched"), [(1.0, 5), (0.5, 3), (0.25, 2), (0.1, 1), (0.01, 0)])
def test_the_link_gets_its_share_of_both_rates(cpu_s: float, n_fetched: int) -> None:
    """One miss a second over the link: of ten, 10 · 1 / 2 = 5; 10 · 0.5 / 1.5 = 3.3; 2.0; 0.9; 0.1."""
    layer = loads({0: 1}, dict.fromkeys(range(1, 11), 1))
    plan = bandwidth_split(0, layer, costs(cpu_s, 0.01, 1.0), Backlog(), 11)
    assert len(plan.fetch) == n_fetched
    assert places(plan)[1] == [0], "what is in a slot runs from there"


def test_rates_are_those_beside_each_other() -> None:
    layer = loads({}, dict.fromkeys(range(10), 1))
    for contention, n_fetched in ((Contention(2.0, 1.0), 3), (Contention(1.0, 2.0), 1), (Contention(2.0, 2.0), 2)):
        plan = bandwidth_split(0, layer, costs(0.25, 0.01, 1.0, contention), Backlog(), 10)
        assert len(plan.fetch) == n_fetched


def test_a_prompt_is_streamed_however_fast_the_cpu_is() -> None:
    layer = loads({0: 8}, {1: PROMPT_ROWS, 2: PROMPT_ROWS})
    assert places(bandwidth_split(0, layer, costs(1e-9, 1.0, 1.0), Backlog(), 3)) == ([], [0], [1, 2])
    layer = loads({0: 8}, {1: PROMPT_ROWS, 2: PROMPT_ROWS - 1})
    assert places(bandwidth_split(0, layer, costs(1e-9, 1.0, 1.0), Backlog(), 3)) == ([1, 2], [0], [])


def test_the_latest_active_are_fetched_first() -> None:
    layer = [Candidate(Load(expert, 0, 1), "miss", score=score) for expert, score in enumerate((0.1, 0.3, 0.2))]
    assert places(bandwidth_split(0, layer, costs(1 / 3, 0.01, 1.0), Backlog(), 3))[2] == [1]


@given(drawn)
def test_the_split_is_what_the_rates_say(given: Instance) -> None:
    plan = given.plan(bandwidth_split)
    expert, k = given.costs.experts[0], given.costs.contention
    n_misses = sum(c.place == "miss" for c in given.candidates)
    pcie, cpu = 1.0 / (k.link * expert.copy_s), 1.0 / (k.cpu * expert.cpu(1))
    prompt = sum(c.load.n_rows for c in given.candidates) >= PROMPT_ROWS * len(given.candidates)
    share = 1.0 if prompt else pcie / (pcie + cpu)
    if given.n_fetch >= n_misses:
        assert abs(len(plan.fetch) - n_misses * share) <= 0.5
    assert not prompt or len(plan.fetch) == min(given.n_fetch, n_misses)


# KTransformers: the CPU, or the whole layer streamed


@given(drawn)
def test_every_miss_runs_on_the_cpu_or_all_are_streamed(given: Instance) -> None:
    plan = given.plan(cpu_or_stream)
    n_misses = sum(c.place == "miss" for c in given.candidates)
    long = sum(c.load.n_rows for c in given.candidates) >= STREAM_ROWS * len(given.candidates)
    assert len(plan.fetch) == (min(given.n_fetch, n_misses) if long else 0)
    assert len(plan.gpu) == len(given.candidates) - n_misses


def test_a_prompt_is_streamed_from_its_threshold_on() -> None:
    layer = loads({0: STREAM_ROWS}, {1: STREAM_ROWS - 1, 2: STREAM_ROWS + 1})
    assert places(cpu_or_stream(0, layer, costs(1.0, 1.0, 1.0), Backlog(), 3)) == ([], [0], [2, 1])
    layer = loads({0: STREAM_ROWS}, {1: STREAM_ROWS - 1, 2: STREAM_ROWS})
    assert places(cpu_or_stream(0, layer, costs(1.0, 1.0, 1.0), Backlog(), 3)) == ([1, 2], [0], [])


# Beside our own


@pytest.mark.parametrize("name", [name for name in PEERS if name != "cpu-or-stream"])
def test_no_peer_is_faster_on_average_than_the_best_cut(name: str) -> None:
    layers = [instance(seed) for seed in range(300)]
    ours, theirs = (sum(layer.plan(rule).predicted_s for layer in layers) for rule in (best_cut, PEERS[name]))
    assert ours < theirs
