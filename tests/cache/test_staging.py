"""Slots for experts in passing: who is refused passes through, and stays if it turns out to be worth it."""

import pytest

from fiddler.cache.cache import ExpertCache
from fiddler.cache.policy import Key
from fiddler.cache.slots import Reservation, Slots
from fiddler.lab.policies import make_policy, uniform

LAYERS = (4, 4)


def cache(
    name: str, n_slots: int, n_staging: int, *, admission: float = 1.0, order: list[Key] | None = None
) -> ExpertCache:
    policy = make_policy(name, LAYERS, order=order)
    return ExpertCache(n_slots + n_staging, LAYERS, policy, floor=0, admission=admission, n_staging=n_staging)


def touch(cache: ExpertCache, key: Key, n_rows: int = 1) -> None:
    cache.observe(key[0], [(key[1], n_rows)], n_rows)


def admit(cache: ExpertCache, *keys: Key) -> list[Reservation]:
    """Copy experts in."""
    reservations = []
    for key in keys:
        reservation = cache.reserve(key)
        assert reservation is not None
        cache.landed(reservation)
        cache.check()
        reservations.append(reservation)
    return reservations


def use(cache: ExpertCache, key: Key) -> None:
    cache.lease(key)
    cache.release(key)
    cache.check()


def full(n_staging: int = 1) -> ExpertCache:
    """A cache of one slot whose expert is worth ten rows, and slots in passing."""
    lfu = cache("lfu", 1, n_staging)
    touch(lfu, (0, 0), 10)
    admit(lfu, (0, 0))
    return lfu


def test_one_that_is_refused_passes_through() -> None:
    lfu = full()
    touch(lfu, (0, 1), 3)
    (passing,) = admit(lfu, (0, 1))
    assert passing.victim is None, "nobody gave way"
    assert lfu.slot((0, 0)) is not None
    assert lfu.slot((0, 1)) == passing.slot
    use(lfu, (0, 1))
    assert not lfu.holds((0, 1)), "used, and let go"
    assert lfu.n_free == 1
    assert lfu.slot((0, 0)) is not None


def test_without_slots_in_passing_it_is_refused() -> None:
    lfu = full(n_staging=0)
    touch(lfu, (0, 1), 3)
    assert lfu.reserve((0, 1)) is None
    assert lfu.stage((0, 1)) is None


def test_one_that_was_used_and_is_worth_more_stays_without_a_second_copy() -> None:
    lfu = full()
    touch(lfu, (0, 1), 3)
    (passing,) = admit(lfu, (0, 1))
    touch(lfu, (0, 1), 8)
    use(lfu, (0, 1))
    assert lfu.slot((0, 1)) == passing.slot, "where it was copied to"
    assert not lfu.holds((0, 0)), "the victim went"
    assert lfu.n_free == 1
    touch(lfu, (0, 2), 1)
    (second,) = admit(lfu, (0, 2))
    assert second.slot != passing.slot, "its slot is one in passing now"
    assert lfu.slot((0, 1)) is not None


def test_one_of_equal_worth_does_not_stay() -> None:
    lfu = full()
    touch(lfu, (0, 1), 3)
    admit(lfu, (0, 1))
    touch(lfu, (0, 1), 7)
    use(lfu, (0, 1))
    assert lfu.slot((0, 0)) is not None
    assert not lfu.holds((0, 1))


def test_it_stays_where_a_slot_has_become_free() -> None:
    lfu = cache("lfu", 1, 1)
    touch(lfu, (0, 0), 10)
    copy = lfu.reserve((0, 0))
    assert copy is not None
    touch(lfu, (0, 1), 3)
    admit(lfu, (0, 1))
    lfu.failed(copy)
    use(lfu, (0, 1))
    assert lfu.slot((0, 1)) is not None
    assert not lfu.holds((0, 0))


def test_only_the_end_of_the_last_lease_lets_it_go() -> None:
    lfu = full()
    touch(lfu, (0, 1), 3)
    admit(lfu, (0, 1))
    lfu.lease((0, 1))
    use(lfu, (0, 1))
    assert lfu.slot((0, 1)) is not None
    lfu.release((0, 1))
    assert not lfu.holds((0, 1))


def test_it_does_not_take_the_place_of_one_that_is_leased() -> None:
    lfu = full()
    lfu.lease((0, 0))
    touch(lfu, (0, 1), 30)
    admit(lfu, (0, 1))
    use(lfu, (0, 1))
    assert lfu.slot((0, 0)) is not None
    assert not lfu.holds((0, 1))


def test_who_is_leased_or_on_its_way_in_passing_stays() -> None:
    lfu = full(n_staging=2)
    for expert in (1, 2, 3):
        touch(lfu, (0, expert), 3)
    admit(lfu, (0, 1))
    lfu.lease((0, 1))
    loading = lfu.reserve((0, 2))
    assert loading is not None
    assert lfu.reserve((0, 3)) is None
    lfu.landed(loading)
    taken = lfu.reserve((0, 3))
    assert taken is not None
    assert taken.victim == (0, 2), "landed and not used: the only one that may be let go"
    assert lfu.slot((0, 1)) is not None
    lfu.check()


def test_of_those_that_wait_in_passing_the_first_to_come_is_let_go() -> None:
    lfu = full(n_staging=2)
    for expert in (2, 1, 3):
        touch(lfu, (0, expert), 3)
    admit(lfu, (0, 2), (0, 1))
    (third,) = admit(lfu, (0, 3))
    assert third.victim == (0, 2)
    assert lfu.n_free == 0


def test_a_copy_that_fails_leaves_its_slot_in_passing_free() -> None:
    lfu = full()
    touch(lfu, (0, 1), 3)
    copy = lfu.reserve((0, 1))
    assert copy is not None
    lfu.failed(copy)
    lfu.check()
    assert not lfu.holds((0, 1))
    assert admit(lfu, (0, 1))[0].victim is None


def test_a_promotion_never_passes_through() -> None:
    lfu = full()
    touch(lfu, (0, 1), 3)
    assert lfu.reserve((0, 1), promotion=True) is None
    admit(lfu, (0, 1))
    touch(lfu, (0, 1), 90)
    assert lfu.promotion([(0, 1)]) is None, "it is there already"


def test_a_warm_start_leaves_the_slots_in_passing_free() -> None:
    lfu = cache("lfu", 3, 2)
    assert len(lfu.fill(lfu.best(99))) == 3
    assert lfu.n_free == 2
    assert lfu.fill(uniform(LAYERS)) == []


def test_experts_pass_a_static_placement_and_the_pinned_never_leave() -> None:
    order: list[Key] = [(1, 3), (0, 2)]
    static = cache("static", 2, 1, order=order)
    for reservation in static.fill(order):
        static.landed(reservation)
    for key in uniform(LAYERS):
        if key not in order:
            touch(static, key, 99)
            (passing,) = admit(static, key)
            assert passing.victim is None
            use(static, key)
            assert not static.holds(key)
    assert [static.slot(key) for key in order] == [0, 1]


def test_a_pinned_expert_does_not_pass_through() -> None:
    static = cache("static", 1, 1, order=[(1, 3)])
    admit(static, (1, 3), (0, 0))
    use(static, (0, 0))
    use(static, (1, 3))
    assert static.slot((1, 3)) is not None


def test_numbers_that_make_no_slots_in_passing_are_refused() -> None:
    for n_staging in (-1, 3):
        with pytest.raises(ValueError, match="n_staging"):
            ExpertCache(2, LAYERS, make_policy("lru", LAYERS), n_staging=n_staging)


def test_check_finds_an_expert_in_passing_that_holds_no_slot() -> None:
    lfu = full()
    lfu._staging.enter((1, 1))
    with pytest.raises(AssertionError):
        lfu.check()


def test_an_evicted_slot_is_free_and_only_an_idle_one_is_evicted() -> None:
    slots = Slots(1)
    reservation = slots.begin((0, 0))
    with pytest.raises(ValueError, match="cannot be evicted"):
        slots.evict((0, 0))
    slots.landed(reservation)
    slots.lease((0, 0))
    with pytest.raises(ValueError, match="cannot be evicted"):
        slots.evict((0, 0))
    slots.release((0, 0))
    slots.evict((0, 0))
    assert (slots.n_free, slots.n_ready) == (1, 0)
    with pytest.raises(ValueError, match="cannot be evicted"):
        slots.evict((0, 0))
    slots.check()
