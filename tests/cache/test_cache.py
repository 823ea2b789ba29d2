"""Who is let in and who gives way, by hand."""

import json

import pytest

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.lab.policies import POLICIES, make_policy, uniform


def cache(
    name: str,
    n_slots: int,
    n_experts: tuple[int, ...],
    *,
    floor: int = 0,
    admission: float = 1.25,
) -> ExpertCache:
    return ExpertCache(n_slots, n_experts, make_policy(name, n_experts), floor=floor, admission=admission)


def touch(cache: ExpertCache, key: Key, n_rows: int = 1) -> None:
    cache.observe(key[0], [(key[1], n_rows)], n_rows)


def admit(cache: ExpertCache, *keys: Key) -> None:
    for key in keys:
        reservation = cache.reserve(key)
        assert reservation is not None
        cache.landed(reservation)


def victim(cache: ExpertCache, key: Key, *, promotion: bool = False) -> Key | None:
    reservation = cache.reserve(key, promotion=promotion)
    cache.check()
    return reservation.victim if reservation else None


def test_the_least_worth_gives_way() -> None:
    lfu = cache("lfu", 2, (3,))
    touch(lfu, (0, 0), 2)
    touch(lfu, (0, 1), 3)
    admit(lfu, (0, 0), (0, 1))
    touch(lfu, (0, 2), 2)
    assert victim(lfu, (0, 2)) == (0, 0)
    assert lfu.slot((0, 0)) is None
    assert lfu.loading((0, 2)) is not None


def test_ties_go_to_the_one_touched_longest_ago_then_to_the_higher_number() -> None:
    lfu = cache("lfu", 4, (4, 2))
    for key in ((0, 2), (0, 1), (1, 0)):
        touch(lfu, key)
    lfu.observe(0, [(0, 1), (3, 1)], 2)
    admit(lfu, (0, 3), (0, 1), (0, 2), (0, 0))
    touch(lfu, (1, 1))
    assert victim(lfu, (1, 1)) == (0, 2), "touched first"
    assert victim(lfu, (1, 0)) == (0, 1), "touched second"
    touch(lfu, (0, 2))
    assert victim(lfu, (0, 2)) == (0, 3), "touched with (0, 0), which stays"


def test_what_is_leased_or_loading_stays() -> None:
    lru = cache("lru", 2, (4,))
    touch(lru, (0, 0))
    admit(lru, (0, 0))
    lru.lease((0, 0))
    touch(lru, (0, 1))
    loading = lru.reserve((0, 1))
    assert loading is not None
    touch(lru, (0, 2))
    assert lru.reserve((0, 2)) is None
    lru.landed(loading)
    assert victim(lru, (0, 2)) == (0, 1)
    lru.release((0, 0))
    touch(lru, (0, 3))
    assert victim(lru, (0, 3)) == (0, 0)


def test_a_demand_does_not_evict_what_is_clearly_worth_more() -> None:
    lfu = cache("lfu", 1, (3,))
    touch(lfu, (0, 0), 5)
    admit(lfu, (0, 0))
    touch(lfu, (0, 1), 3)
    assert lfu.reserve((0, 1)) is None, "5 > 1.25 · 3"
    touch(lfu, (0, 1), 1)
    assert victim(lfu, (0, 1)) == (0, 0), "5 = 1.25 · 4"


def test_a_promotion_has_to_beat_its_victim() -> None:
    lfu = cache("lfu", 1, (3,))
    touch(lfu, (0, 0), 4)
    admit(lfu, (0, 0))
    touch(lfu, (0, 1), 4)
    assert lfu.promotion(uniform(lfu.history.n_experts)) is None
    assert lfu.reserve((0, 1), promotion=True) is None
    touch(lfu, (0, 1), 1)
    assert lfu.promotion(uniform(lfu.history.n_experts)) == ((0, 1), 0.0), "plain counts tell no rate"
    assert victim(lfu, (0, 1), promotion=True) == (0, 0)


def test_a_promotion_tells_how_many_more_visits_it_may_expect() -> None:
    aged = cache("aged-lfu", 1, (3,))
    touch(aged, (0, 0), 4)
    admit(aged, (0, 0))
    touch(aged, (0, 1), 6)
    found = aged.promotion([(0, 1), (0, 2)])
    assert found is not None
    key, advantage = found
    assert key == (0, 1)
    assert advantage == aged.policy.rate((0, 1)) - aged.policy.rate((0, 0)) > 0.0


def test_a_promotion_takes_a_free_slot_if_it_is_worth_anything() -> None:
    lfu = cache("lfu", 2, (3,))
    assert lfu.promotion(uniform(lfu.history.n_experts)) is None
    touch(lfu, (0, 2))
    assert lfu.promotion(uniform(lfu.history.n_experts)) == ((0, 2), 0.0)
    admit(lfu, (0, 2))
    assert lfu.promotion(uniform(lfu.history.n_experts)) is None, "the others were never touched"


def test_a_layer_keeps_its_floor_against_others_only() -> None:
    lru = cache("lru", 3, (2, 3), floor=1)
    for key in ((0, 0), (1, 0), (1, 1)):
        touch(lru, key)
        admit(lru, key)
    touch(lru, (1, 2))
    assert victim(lru, (1, 2)) == (1, 0), "(0, 0) is older, and all its layer has"
    touch(lru, (0, 1))
    assert victim(lru, (0, 1)) == (0, 0), "within the layer the floor says nothing"


def test_a_floor_too_high_for_all_is_lowered() -> None:
    lru = cache("lru", 2, (2, 2), floor=5)
    admit(lru, (0, 0), (1, 0))
    touch(lru, (1, 1))
    assert victim(lru, (1, 1)) == (1, 0)


def test_a_per_layer_policy_divides_the_slots() -> None:
    hybrimoe = cache("hybrimoe", 3, (3, 3))
    for expert in range(3):
        touch(hybrimoe, (0, expert))
        touch(hybrimoe, (1, expert))
    admit(hybrimoe, (0, 0), (0, 1))
    assert victim(hybrimoe, (0, 2)) == (0, 0), "its layer has two of the three slots, one of all is free"
    admit(hybrimoe, (1, 0))
    assert victim(hybrimoe, (1, 1)) == (1, 0)


def test_the_slots_that_are_left_over_go_to_the_first_layers() -> None:
    hybrimoe = cache("hybrimoe", 3, (3, 3))
    for expert in range(2):
        touch(hybrimoe, (1, expert))
    admit(hybrimoe, (1, 0))
    assert victim(hybrimoe, (1, 1)) == (1, 0)
    assert hybrimoe.n_free == 2


def test_layers_are_compared_by_their_own_clocks() -> None:
    aged = cache("aged-lfu", 2, (2, 2))
    aged.observe(0, [], 900)
    touch(aged, (0, 0))
    touch(aged, (1, 0))
    admit(aged, (0, 0), (1, 0))
    aged.observe(0, [], 100)
    touch(aged, (1, 1))
    assert victim(aged, (1, 1)) == (0, 0), "a hundred tokens old, though its layer's clock stood higher"


def test_a_static_placement_never_moves() -> None:
    static = cache("static", 2, (2, 2))
    assert static.reserve((0, 1)) is None, "a slot is free, but not for this one"
    assert static.promotion(uniform(static.history.n_experts)) == ((0, 0), 0.0)
    admit(static, (0, 0), (1, 0))
    touch(static, (0, 1), 99)
    assert static.reserve((0, 1)) is None
    assert static.promotion(uniform(static.history.n_experts)) is None


def test_without_slots_nobody_is_let_in() -> None:
    none = cache("aged-lfu", 0, (2,))
    touch(none, (0, 0))
    assert none.reserve((0, 0)) is None
    assert none.promotion(uniform(none.history.n_experts)) is None
    assert none.fill(none.best(3)) == []


def test_only_absent_experts_are_let_in() -> None:
    lru = cache("lru", 2, (3,))
    admit(lru, (0, 0))
    with pytest.raises(ValueError, match="has a slot"):
        lru.reserve((0, 0))
    lru.check()


@pytest.mark.parametrize("name", POLICIES)
def test_a_cache_that_knows_nothing_fills_its_layers_evenly(name: str) -> None:
    empty = cache(name, 5, (4, 4))
    reservations = empty.fill(empty.best(99))
    assert [reservation.key for reservation in reservations] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert empty.n_free == 0
    assert empty.fill([(0, 0), (1, 3)]) == []


@pytest.mark.parametrize("name", POLICIES)
def test_a_warm_start_holds_what_was_worth_most(name: str) -> None:
    first, second = cache(name, 4, (4, 4)), cache(name, 4, (4, 4))
    for key in uniform((4, 4)):
        touch(first, key, 1 + (3 * key[1] + key[0]) % 4)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert second.best(4) == first.best(4)
    assert second.promotion(uniform(second.history.n_experts)) == first.promotion(uniform(first.history.n_experts))
    admit(second, *second.best(4))
    assert second.n_ready == second.n_slots
    second.check()


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "lru"},
        {"policy": None},
        {"n_experts": [[2, 2]]},
        {"history": {}},
        {"history": None},
        {"history": {"n_visits": [[10**400]]}},
        {"worth": {"half_life": 32.0, "logs": [[float("nan"), 0.0], [0.0]]}},
        {"worth": {"half_life": -1.0, "logs": [[0.0, 0.0], [0.0]]}},
        {"worth": {"half_life": 32.0, "logs": [[1e300, 0.0], [0.0]]}},
        {"worth": {"half_life": 32.0, "logs": [[0.0, 0.0]]}},
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: dict[str, object]) -> None:
    aged = cache("aged-lfu", 1, (2, 1))
    touch(aged, (0, 1))
    saved = aged.state()
    touch(aged, (0, 0))
    before = aged.state()
    with pytest.raises(ValueError, match="saved"):
        aged.restore({**saved, **change})
    assert aged.state() == before
    aged.restore(saved)
    assert aged.state() == saved


def test_a_state_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="not an object"):
        cache("lru", 1, (2,)).restore([])  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"policy": "x" * 10**5}, {"n_experts": [["x" * 10**5, 1]]}])
def test_a_long_state_is_not_told_whole(change: dict[str, object]) -> None:
    lru = cache("lru", 1, (2, 1))
    with pytest.raises(ValueError, match="saved") as refused:
        lru.restore({**lru.state(), **change})
    assert len(str(refused.value)) < 200


def test_a_history_from_the_future_is_refused() -> None:
    lru = cache("lru", 1, (2,))
    touch(lru, (0, 1))
    state = json.loads(json.dumps(lru.state()))
    state["history"]["last_visit"][0][0] = 7
    with pytest.raises(ValueError, match="future"):
        lru.restore(state)


def test_numbers_that_make_no_cache_are_refused() -> None:
    for wrong in ({"n_slots": -1}, {"floor": -1}, {"n_staging": 2}, {"admission": 0.9}, {"n_experts": (3,)}):
        options = {"n_slots": 1, "n_experts": (2,), "floor": 0, **wrong}
        with pytest.raises(ValueError, match=r"negative|knows layers"):
            ExpertCache(policy=make_policy("lru", (2,)), **options)  # type: ignore[arg-type]
