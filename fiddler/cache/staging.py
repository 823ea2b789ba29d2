"""Slots for experts in passing: used, and let go for the next unless they turn out to be worth keeping."""

from collections.abc import Callable

from fiddler.cache.keys import Key


class Staging:
    """The experts in these slots, in the order in which they came."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._held: dict[Key, None] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def oldest(self, idle: Callable[[Key], bool]) -> Key | None:
        """Who is let go next, where all slots are taken; None where nobody may."""
        return next((key for key in self._held if idle(key)), None)

    @property
    def vacant(self) -> bool:
        """Whether a slot is free."""
        return len(self._held) < self.n_slots

    def enter(self, key: Key) -> None:
        """The expert holds one of the slots from now on."""
        self._held[key] = None

    def leave(self, key: Key) -> None:
        """The expert holds none any more."""
        del self._held[key]

    def check(self, held: set[Key]) -> None:
        """AssertionError where more are held than there are slots, or somebody who holds none."""
        assert len(self._held) <= self.n_slots
        assert self._held.keys() <= held
