"""Plans: near the best there is, their makespan exactly what lanes take, every load in one place."""

from itertools import permutations
from random import Random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cost.lanes import Backlog
from fiddler.cost.model import CostModel, Curve, ExpertCosts
from fiddler.scheduler.plan import Candidate, Plan, Planner, all_cpu, all_fetch, assign, best_cut
from fiddler.scheduler.routing import Load
from tests.scheduler.instances import Instance, instance, instances
from tests.scheduler.oracle import best_s, execute, replay

PLANNERS = pytest.mark.parametrize("planner", [best_cut, all_cpu, all_fetch])
drawn = st.builds(instance, st.integers(0, 2**32), st.integers(1, 40))


def flat(cpu_s: float, gpu_s: float, copy_s: float) -> CostModel:
    """Costs that do not depend on rows."""
    return CostModel((ExpertCosts(Curve(((1.0, cpu_s),)), Curve(((1.0, gpu_s),)), copy_s, nbytes=1),))


def hits(n: int) -> list[Candidate]:
    return [Candidate(Load(expert, expert, expert + 1), "hit") for expert in range(n)]


def misses(*rows: int) -> list[Candidate]:
    return [Candidate(Load(expert, 0, n), "miss") for expert, n in enumerate(rows)]


def ids(loads: tuple[Load, ...]) -> list[int]:
    return [load.expert for load in loads]


def test_the_best_cut_is_near_the_best_plan() -> None:
    ratios = sorted(given.plan(best_cut).predicted_s / best_s(given) for given in instances(range(3000)))
    assert ratios[0] >= 1.0 - 1e-9, "nothing is better than the best"
    assert mean(ratios) <= 1.01
    assert ratios[round(0.99 * len(ratios))] <= 1.10


@given(drawn, st.randoms(use_true_random=False))
def test_the_makespan_of_any_assignment_is_what_lanes_take(given: Instance, rng: Random) -> None:
    gpu = [c for c in given.candidates if rng.random() < 0.5]
    cpu = [c for c in given.candidates if c not in gpu]
    rng.shuffle(gpu)
    plan = assign(0, cpu, gpu, given.costs, given.backlog)
    assert ids(plan.fetch) == [c.load.expert for c in gpu if c.place == "miss"], "copied in the order given"
    assert replay(given, plan) == pytest.approx(plan.predicted_s, rel=1e-9)


@PLANNERS
@given(given=drawn)
def test_a_planner_predicts_what_lanes_take(planner: Planner, given: Instance) -> None:
    plan = given.plan(planner)
    assert replay(given, plan) == pytest.approx(plan.predicted_s, rel=1e-9)


@PLANNERS
@given(given=drawn)
def test_every_load_is_in_one_place(planner: Planner, given: Instance) -> None:
    plan = given.plan(planner)
    place = {c.load.expert: c.place for c in given.candidates}
    assert sorted(ids(plan.cpu + plan.gpu + plan.fetch)) == sorted(place)
    assert len(plan.fetch) <= given.n_fetch
    assert all(place[expert] == "miss" for expert in ids(plan.fetch))
    assert all(place[expert] != "miss" for expert in ids(plan.gpu))


@given(drawn)
def test_the_order_within_each_place(given: Instance) -> None:
    plan = given.plan(best_cut)
    gpu = given.named(plan.gpu)
    assert ids(plan.cpu) == sorted(ids(plan.cpu))
    assert gpu == sorted(gpu, key=lambda c: (c.place != "hit", c.ahead_s, c.load.expert))
    assert [load.n_rows for load in plan.fetch] == sorted((load.n_rows for load in plan.fetch), reverse=True)


@given(drawn, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_candidates(given: Instance, rng: Random) -> None:
    shuffled = rng.sample(given.candidates, len(given.candidates))
    again = best_cut(0, shuffled, given.costs, given.backlog, given.n_fetch)
    assert again == given.plan(best_cut)


@given(drawn)
def test_the_best_cut_is_never_longer_than_no_fetches(given: Instance) -> None:
    assert given.plan(best_cut).predicted_s <= given.plan(all_cpu).predicted_s * (1 + 1e-9)


def test_each_fetch_shortens_the_makespan() -> None:
    for layer in instances(range(200)):
        plan = layer.plan(best_cut)
        cpu, gpu = layer.named(plan.cpu), layer.named(plan.gpu + plan.fetch)
        for dropped in layer.named(plan.fetch):
            fewer = assign(0, [*cpu, dropped], [c for c in gpu if c != dropped], layer.costs, layer.backlog)
            assert fewer.predicted_s > plan.predicted_s


def test_no_order_of_the_copies_is_better() -> None:
    for layer in instances(range(200)):
        plan = layer.plan(all_fetch)
        cpu, gpu, fetch = (layer.named(loads) for loads in (plan.cpu, plan.gpu, plan.fetch))
        for order in permutations(fetch[:4]):
            assert execute(layer, cpu, [*gpu, *order, *fetch[4:]]) >= plan.predicted_s * (1 - 1e-9)


def test_nothing_to_plan() -> None:
    assert best_cut(0, [], flat(1.0, 1.0, 1.0), Backlog(1.0, 1.0, 1.0), 4) == Plan((), (), (), 0.0)


def test_a_slow_link_fetches_nothing() -> None:
    plan = best_cut(0, misses(1, 1, 1), flat(cpu_s=1.0, gpu_s=0.1, copy_s=3.0), Backlog(), 3)
    assert plan.fetch == ()
    assert plan.predicted_s == 3.0


def test_a_slow_cpu_fetches_all_it_may() -> None:
    costs = flat(cpu_s=50.0, gpu_s=0.1, copy_s=1.0)
    assert len(best_cut(0, misses(1, 1, 1), costs, Backlog(), 3).fetch) == 3
    assert len(best_cut(0, misses(1, 1, 1), costs, Backlog(), 2).fetch) == 2


def test_the_misses_are_split_where_both_sides_end_together() -> None:
    plan = best_cut(0, misses(1, 1, 1, 1, 1, 1), flat(cpu_s=2.0, gpu_s=1.0, copy_s=3.0), Backlog(), 6)
    assert len(plan.fetch) == 2
    assert plan.predicted_s == 8.0


def test_most_rows_are_fetched_then_the_higher_score() -> None:
    costs = flat(cpu_s=2.0, gpu_s=0.0, copy_s=1.5)
    assert ids(best_cut(0, misses(1, 2, 1), costs, Backlog(), 1).fetch) == [1]
    scored = [Candidate(Load(expert, 0, 1), "miss", score=score) for expert, score in enumerate((0.1, 0.3, 0.2))]
    assert ids(best_cut(0, scored, costs, Backlog(), 1).fetch) == [1]


def test_hits_move_to_the_cpu_when_the_gpu_is_the_longer_side() -> None:
    plan = best_cut(0, hits(6), flat(cpu_s=1.0, gpu_s=1.0, copy_s=1.0), Backlog(), 0)
    assert (len(plan.cpu), len(plan.gpu)) == (3, 3)
    behind = best_cut(0, hits(6), flat(cpu_s=1.0, gpu_s=1.0, copy_s=1.0), Backlog(gpu_s=10.0), 0)
    assert behind.gpu == ()


def test_a_landing_expert_is_waited_for_or_run_on_the_cpu() -> None:
    candidate, backlog = Candidate(Load(0, 0, 1), "landing", ahead_s=2.0), Backlog(link_s=2.0)
    assert best_cut(0, [candidate], flat(5.0, 1.0, 4.0), backlog, 0).predicted_s == 3.0
    assert ids(best_cut(0, [candidate], flat(2.5, 1.0, 4.0), backlog, 0).cpu) == [0]


def test_other_layers_work_alone_does_not_count() -> None:
    plan = best_cut(0, hits(1), flat(1.0, 1.0, 1.0), Backlog(cpu_s=9.0), 0)
    assert plan.predicted_s == 1.0


def test_baselines() -> None:
    candidates = [*hits(2), Candidate(Load(2, 0, 1), "miss"), Candidate(Load(3, 0, 5), "miss")]
    for planner, n_fetch, fetched in ((all_cpu, 2, []), (all_fetch, 1, [3]), (all_fetch, 9, [3, 2])):
        plan = planner(0, candidates, flat(1.0, 1.0, 1.0), Backlog(), n_fetch)
        assert ids(plan.gpu) == [0, 1]
        assert ids(plan.fetch) == fetched
