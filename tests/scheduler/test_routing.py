"""A layer's routing as plain integers: every visit once, grouped by expert."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.scheduler.routing import LayerWork, Load, route


@dataclass(frozen=True)
class Routing:
    """A flattened routing as a model makes it, with ids and weights that are to be dropped among it."""

    experts: list[int]
    n_experts: int
    weights: list[float] | None

    def kept(self, position: int) -> bool:
        weight = 1.0 if self.weights is None else self.weights[position]
        return 0 <= self.experts[position] < self.n_experts and weight != 0.0

    def work(self) -> LayerWork:
        return route(0, self.experts, self.n_experts, self.weights)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    n_experts = draw(st.integers(1, 8))
    experts = draw(st.lists(st.integers(-2, n_experts + 1), max_size=40))
    weight = st.one_of(st.just(0.0), st.just(-0.0), st.floats(-1, 1))
    weights = st.lists(weight, min_size=len(experts), max_size=len(experts))
    return Routing(experts, n_experts, draw(st.none() | weights))


@given(routings())
@settings(deadline=None)
def test_every_visit_is_there_exactly_once(routing: Routing) -> None:
    kept = [position for position in range(len(routing.experts)) if routing.kept(position)]
    assert sorted(routing.work().order) == kept


@given(routings())
@settings(deadline=None)
def test_loads_lie_back_to_back_and_cover_the_order(routing: Routing) -> None:
    work = routing.work()
    starts = [load.start for load in work.loads]
    stops = [load.stop for load in work.loads]
    assert [*starts, len(work.order)] == [0, *stops]
    assert sum(load.n_rows for load in work.loads) == len(work.order)
    assert all(load.n_rows > 0 for load in work.loads)


@given(routings())
@settings(deadline=None)
def test_each_load_holds_the_visits_of_its_expert(routing: Routing) -> None:
    work = routing.work()
    for load in work.loads:
        assert {routing.experts[p] for p in work.order[load.start : load.stop]} == {load.expert}


@given(routings())
@settings(deadline=None)
def test_experts_ascend_and_so_do_the_visits_of_each(routing: Routing) -> None:
    work = routing.work()
    experts = [load.expert for load in work.loads]
    assert experts == sorted(set(experts))
    for load in work.loads:
        visits = list(work.order[load.start : load.stop])
        assert visits == sorted(visits)


@given(routings())
@settings(deadline=None)
def test_the_same_routing_makes_the_same_work(routing: Routing) -> None:
    assert routing.work() == routing.work()


@given(st.lists(st.integers(0, 5), max_size=30))
@settings(deadline=None)
def test_without_weights_every_visit_counts(experts: list[int]) -> None:
    assert route(0, experts, 6) == route(0, experts, 6, [1.0] * len(experts))


def test_an_example() -> None:
    work = route(3, [2, 0, 0, 2, 9, -1, 1, 2], 3, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.5])
    assert work == LayerWork(3, (Load(0, 0, 2), Load(2, 2, 5)), (1, 2, 0, 3, 7))


def test_nothing_routed_is_no_work() -> None:
    assert route(1, [], 4) == LayerWork(1, (), ())
    assert route(1, [4, -1], 4) == LayerWork(1, (), ())


def test_a_weight_that_is_not_a_number_is_not_dropped() -> None:
    assert route(0, [1], 2, [float("nan")]).order == (0,), "a broken router must show, not vanish"
