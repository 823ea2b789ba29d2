"""Copies made ahead: which rule asks for which, what is learnt of them, and when they are given up."""

from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Rows
from fiddler.cache.slots import Reservation
from fiddler.cost.lanes import Backlog
from fiddler.cost.model import Contention, CostModel, Curve, ExpertCosts
from fiddler.lab.policies import make_policy
from fiddler.lab.systems import EAGER, IMPACT, LookAhead, eager, impact
from fiddler.scheduler.guesses import PAYS, Guess, NextLayer, Rule, View, pays, price_s, saved_s
from fiddler.scheduler.layer import Layer, Wave
from fiddler.scheduler.plan import Candidate, Planner, all_cpu, all_fetch, best_cut
from fiddler.scheduler.prefetch import ENOUGH, REST, TRUST, WEIGHT, Prefetcher
from fiddler.scheduler.routing import Load
from tests.scheduler.desk import LAYERS, work

CPU_S, GPU_S, COPY_S, K_CPU = 4.0, 1.0, 3.0, 1.25
IDLE, BUSY = Backlog(), Backlog(cpu_s=9.0)


def model(cpu_s: float = CPU_S, k_cpu: float = K_CPU, gpu_s: float = GPU_S) -> CostModel:
    """On the CPU by the row, on the GPU all the same."""
    by_row = Curve(((1.0, cpu_s), (2.0, 2 * cpu_s)))
    expert = ExpertCosts(by_row, Curve(((1.0, gpu_s),)), COPY_S, 1)
    return CostModel((expert,) * len(LAYERS), Contention(k_cpu, 1.5))


def view(
    *guesses: tuple[int, int, float],
    costs: CostModel | None = None,
    backlog: Backlog = IDLE,
    gap_s: float = 0.0,
    planner: Planner = best_cut,
    here: Sequence[int] = (),
) -> View:
    """What a rule sees, with the experts in `here` in their slots."""
    coming = NextLayer(1, tuple(Guess(*guess) for guess in guesses))
    absent = [guess for guess in coming.guesses if guess.expert not in here]
    return View(coming, absent, costs or model(), backlog, gap_s, planner)


# Rules


def test_what_a_copy_saves_is_the_cpus_work_less_the_gpus() -> None:
    assert saved_s(model(), 1, 2) == 2 * CPU_S - GPU_S
    assert saved_s(model(gpu_s=9.0), 1, 1) == 0.0, "never less than nothing"


@pytest.mark.parametrize(
    ("cpu_s", "gap_s", "beside_s"),
    [(9.0, 0.0, 1.5 * COPY_S), (0.0, COPY_S, 0.0), (0.0, 1.0, 1.5 * 2.0), (1.0, 1.0, 1.25 + 1.75)],
    ids=["beside the CPU", "in the gap it has nothing to do", "the gap, then the next layer", "all three"],
)
def test_a_copy_costs_what_it_takes_from_the_cpu(cpu_s: float, gap_s: float, beside_s: float) -> None:
    assert price_s(model(), 1, cpu_s, gap_s) == pytest.approx((1.0 - 1.0 / K_CPU) * beside_s)
    assert price_s(model(k_cpu=1.0), 1, cpu_s, gap_s) == 0.0, "where it takes nothing"


def test_what_cannot_land_in_time_is_not_copied() -> None:
    assert pays(view((0, 1, 0.9), backlog=Backlog(cpu_s=3.5))) is None
    assert pays(view((0, 1, 0.9), backlog=Backlog(cpu_s=3.6))) == Guess(0, 1, 0.9), "4.5 s beside each other"
    assert pays(view((0, 1, 0.9), backlog=Backlog(gpu_s=3.0))) is not None, "a layer lasts as long as its GPU work"
    assert pays(view((0, 1, 0.9), backlog=Backlog(cpu_s=1.0), gap_s=2.2)) is not None, "or until the next begins"
    assert pays(view((0, 1, 0.9), (1, 1, 0.75))) is not None, "or while that one's other misses are computed"
    assert pays(view((0, 1, 0.9), (1, 1, 0.74))) is None


def test_what_costs_more_than_its_chance_of_saving_is_not_copied() -> None:
    assert pays(view((0, 1, 0.31), backlog=BUSY)) == Guess(0, 1, 0.31), "0.9 s are lost, 3 s are saved"
    assert pays(view((0, 1, 0.29), backlog=BUSY)) is None
    assert pays(view((0, 2, 0.29), backlog=BUSY)) is not None, "two rows save 7 s"
    assert pays(view((0, 1, 0.99), backlog=BUSY, costs=model(gpu_s=CPU_S))) is None


def test_in_the_gap_a_copy_is_free() -> None:
    assert pays(view((0, 1, 1e-6), gap_s=COPY_S)) is not None
    assert pays(view((0, 1, 1e-6), gap_s=COPY_S, costs=model(gpu_s=CPU_S))) is None, "but must save something"


def test_eager_copies_the_first_two_whatever_they_cost() -> None:
    asked = view((4, 1, 0.01), (2, 1, 0.01), (3, 1, 0.01))
    for n_copied, expected in enumerate((4, 4, None)):
        asked.coming.copied = dict.fromkeys(range(n_copied), 0.0)
        chosen = eager(asked)
        assert (chosen.expert if chosen else None) == expected


def test_impact_takes_what_shortens_the_next_layer_most() -> None:
    guesses = (0, 1, 0.9), (1, 5, 0.1), (2, 1, 0.9)
    assert impact(view(*guesses, planner=all_cpu)) == Guess(1, 5, 0.1), "its rows decide, not its chance"
    assert impact(view(*guesses, planner=all_cpu, here=[1])) == Guess(0, 1, 0.9), "of equals the likeliest"
    assert impact(view(*guesses, planner=all_cpu, costs=model(gpu_s=90.0))) is None, "nothing is gained"


@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    here=st.sets(st.integers(0, 5)),
    gpu_s=st.floats(0.1, 20.0),
    planner=st.sampled_from([best_cut, all_cpu, all_fetch]),
)
def test_no_guess_has_more_impact_than_the_one_that_is_taken(
    rows: list[int], here: set[int], gpu_s: float, planner: Planner
) -> None:
    costs = model(gpu_s=gpu_s)
    asked = view(*((e, n, 0.5) for e, n in enumerate(rows)), costs=costs, planner=planner, here=sorted(here))
    if not asked.absent:
        return

    def makespan_s(there: set[int]) -> float:
        candidates = [Candidate(Load(e, 0, n), "hit" if e in there else "miss") for e, n in enumerate(rows)]
        n_fetch = sum(c.place == "miss" for c in candidates)
        return planner(1, candidates, costs, Backlog(), n_fetch).predicted_s

    gains = {guess: makespan_s(here) - makespan_s(here | {guess.expert}) for guess in asked.absent}
    chosen = impact(asked)
    assert chosen is None if max(gains.values()) <= 0.0 else chosen is not None
    assert chosen is None or gains[chosen] == max(gains.values())


# What is learnt


def empty() -> ExpertCache:
    """Four slots to keep and two in passing."""
    return ExpertCache(6, LAYERS, make_policy("lru", LAYERS), n_staging=2)


class Made:
    """A prefetcher and its cache, waves one by one through layers 0 and 1, and copies that take no lane."""

    def __init__(self, rule: Rule = EAGER, costs: CostModel | None = None) -> None:
        self.costs = costs or model()
        self.cache = empty()
        self.made = Prefetcher(LookAhead(), rule, self.cache)
        self.wave = Wave()

    def expect(self, ahead: Rows, now_s: float = 0.0) -> None:
        self.wave = Wave()
        self.made.come(Layer(self.wave, work(0, {}), 1, 1, ahead=ahead), {}, now_s, self.costs)

    def visit(self, *experts: int, now_s: float = 0.0) -> None:
        rows = dict.fromkeys(experts, 1)
        self.made.come(Layer(self.wave, work(1, rows), 1, 1), rows, now_s, self.costs)
        self.made.drop(self.wave)

    def copy(self, *, land: bool = True, backlog: Backlog = BUSY) -> Reservation | None:
        reservation = self.made.choose(self.costs, backlog, all_cpu)
        if reservation is not None and land:
            self.cache.landed(reservation)
            self.made.landed(reservation.key)
        return reservation

    def absent(self, expert: int) -> None:
        """Let the cache forget an expert."""
        if self.cache.slot((1, expert)) is not None:
            self.cache = self.made._cache = empty()


def test_copies_and_guesses_are_counted_once_their_layer_comes() -> None:
    desk = Made()
    desk.expect([(0, 1), (1, 1), (2, 1)])
    assert [desk.copy(), desk.copy(), desk.copy()][2] is None
    use = desk.made.use
    assert (use.n_issued, use.n_settled, use.n_guesses) == (2, 0, 0)
    desk.visit(1, 2, 3)
    assert (use.n_issued, use.n_settled, use.n_landed, use.n_used) == (2, 2, 2, 1)
    assert (use.n_guesses, use.n_true) == (3, 2)
    assert use.gained_s == CPU_S - GPU_S
    assert use.cost_s == pytest.approx(2 * 0.9)


def test_a_copy_that_is_late_or_fails_did_not_land() -> None:
    desk = Made()
    desk.expect([(0, 1), (1, 1)])
    late, failed = desk.copy(land=False), desk.copy(land=False)
    assert late is not None
    assert failed is not None
    desk.cache.failed(failed)
    desk.visit(0, 1)
    use = desk.made.use
    assert (use.n_settled, use.n_landed, use.n_used) == (2, 0, 2)
    assert use.gained_s == CPU_S - GPU_S, "a copy that failed saved nothing"


def test_what_a_wave_expected_is_forgotten_with_it() -> None:
    desk = Made()
    desk.expect([(0, 1)])
    desk.made.drop(desk.wave)
    assert desk.copy() is None
    desk.visit(0)
    assert desk.made.use.n_guesses == 0


def test_what_is_there_or_on_its_way_is_not_copied_again() -> None:
    desk = Made()
    desk.expect([(0, 1), (1, 1)])
    copies = [desk.copy(land=False), desk.copy(land=False)]
    assert [copy and copy.key for copy in copies] == [(1, 0), (1, 1)]
    desk.expect([(0, 1), (1, 1)])
    assert desk.copy() is None


def test_chances_come_to_be_how_often_each_place_came_true() -> None:
    rng, rates = Random(1), (0.9, 0.5, 0.1)
    seen: list[View] = []

    def watch(asked: View) -> Guess | None:
        seen.append(asked)
        return None

    desk = Made(Rule(watch))
    sums = [0.0, 0.0, 0.0]
    for layer in range(3000):
        desk.expect([(e, 1) for e in range(3)])
        desk.copy()
        if layer >= 1000:
            sums = [total + guess.chance for total, guess in zip(sums, seen[-1].coming.guesses, strict=True)]
        desk.visit(*[e for e, rate in enumerate(rates) if rng.random() < rate])
    assert [guess.chance for guess in seen[0].coming.guesses] == [TRUST] * 3
    assert [total / 2000 for total in sums] == pytest.approx(rates, abs=0.03)


def test_the_gap_is_the_time_from_a_layers_end_to_the_next() -> None:
    gaps: list[float] = []

    def watch(asked: View) -> Guess | None:
        gaps.append(asked.gap_s)
        return None

    desk = Made(Rule(watch))
    for now_s, gap_s in ((10.0, 2.0), (20.0, 3.0)):
        desk.expect([(0, 1)], now_s)
        desk.wave.passed_s = now_s + 1.0
        ready = Layer(desk.wave, work(1, {}), 1, 1, ahead=[(0, 1)])
        desk.made.come(ready, {}, now_s + 1.0 + gap_s, desk.costs)
        desk.copy()
        desk.made.drop(desk.wave)
    assert gaps == [2.0, pytest.approx(2.0 + WEIGHT)]


# Giving up


def losing(rule: Rule, n_layers: int, visited: Callable[[int], bool] = lambda layer: False) -> Made:
    """Copies that cost a little beside a CPU that is busy, of an expert that is not there."""
    desk = Made(rule, model(k_cpu=1.001))
    for layer in range(n_layers):
        desk.expect([(0, 1)])
        desk.copy()
        desk.visit(*([0] if visited(layer) else []))
        desk.absent(0)
    return desk


def test_what_does_not_pay_is_switched_off_and_tried_again_after_a_rest() -> None:
    desk = losing(PAYS, ENOUGH)
    made = desk.made
    assert made.use.n_issued == ENOUGH
    n_waves = 0
    while made.resting:
        desk.expect([(0, 1)])
        assert made.resting == 0 or desk.copy() is None
        desk.visit(0)
        n_waves += 1
    assert 2 * n_waves == REST, "two layers a wave"
    assert made.use.n_guesses == ENOUGH + n_waves, "it goes on guessing meanwhile"
    desk.expect([(0, 1)])
    assert desk.copy() is not None


def test_what_pays_is_never_switched_off() -> None:
    desk = losing(PAYS, 4 * ENOUGH, lambda layer: layer % 2 == 0)
    assert desk.made.resting == 0
    assert desk.made.use.n_issued == 4 * ENOUGH
    assert desk.made.use.gained_s > desk.made.use.cost_s


@pytest.mark.parametrize("rule", [EAGER, IMPACT])
def test_other_systems_never_give_up(rule: Rule) -> None:
    desk = losing(rule, 2 * ENOUGH)
    assert desk.made.use.cost_s > desk.made.use.gained_s
    assert desk.made.resting == 0
    assert desk.made.use.n_issued == 2 * ENOUGH
