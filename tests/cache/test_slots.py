"""One slot's life, and what is refused."""

import pytest

from fiddler.cache.slots import Slots


def test_a_slot_is_reserved_lands_is_leased_and_given_up() -> None:
    slots = Slots(1)
    reservation = slots.begin((0, 3))
    assert (reservation.slot, reservation.generation, reservation.victim) == (0, 1, None)
    assert slots.loading((0, 3)) == reservation
    assert slots.ready.get((0, 3)) is None, "not before the copy is over"
    slots.landed(reservation)
    assert slots.ready.get((0, 3)) == slots.lease((0, 3)) == 0
    slots.lease((0, 3))
    slots.release((0, 3))
    assert not slots.idle((0, 3)), "one of two leases is left"
    with pytest.raises(ValueError, match="leased"):
        slots.begin((1, 1), (0, 3))
    slots.release((0, 3))
    second = slots.begin((1, 1), (0, 3))
    assert (second.slot, second.generation, second.victim) == (0, 2, (0, 3))
    slots.check()


def test_a_failed_copy_leaves_its_slot_free() -> None:
    slots = Slots(1)
    slots.failed(slots.begin((0, 0)))
    assert (slots.n_free, slots.n_ready) == (1, 0)
    assert slots.begin((0, 0)).generation == 2
    slots.check()


def test_a_copy_ends_once() -> None:
    slots = Slots(2)
    first = slots.begin((0, 0))
    slots.failed(first)
    slots.begin((0, 0))
    for end in (slots.landed, slots.failed):
        with pytest.raises(ValueError, match="stale"):
            end(first)
    slots.check()


def test_misuse_is_refused() -> None:
    slots = Slots(1)
    with pytest.raises(ValueError, match="not ready"):
        slots.lease((0, 0))
    with pytest.raises(ValueError, match="not leased"):
        slots.release((0, 0))
    slots.begin((0, 0))
    with pytest.raises(ValueError, match="has a slot"):
        slots.begin((0, 0))
    with pytest.raises(ValueError, match="no slot is free"):
        slots.begin((0, 1))
    with pytest.raises(ValueError, match="cannot be evicted"):
        slots.begin((0, 1), (0, 0))
    slots.check()
