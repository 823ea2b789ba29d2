"""Who holds room for keys and values, and how much is left. The engine's loop is its only user."""

from dataclasses import dataclass

from fiddler.models.kv_arena import KvArena, Run


@dataclass(frozen=True, slots=True, eq=False)
class Reserved:
    """Room for the keys and values of one request, for as long as it runs."""

    n_tokens: int
    run: Run | None
    """Where it lies, if in an arena."""


class KvRoom:
    """Room for `n_tokens` tokens in all, which lie in `arena` if there is one; without a limit if `None`."""

    def __init__(self, n_tokens: int | None, arena: KvArena | None = None) -> None:
        assert arena is None or arena.n_tokens == n_tokens
        self.n_tokens = n_tokens
        self.n_reserved = 0
        """Tokens that are reserved now."""
        self._arena = arena
        self._held: set[Reserved] = set()

    def reserve(self, n_tokens: int) -> Reserved | None:
        """Reserve room for one request, or return `None` until others have left.

        It never asks for more than there is in all, or it would wait for ever: `engine.request.token_limit`.
        """
        assert self.n_tokens is None or n_tokens <= self.n_tokens
        if self.n_tokens is not None and self.n_reserved + n_tokens > self.n_tokens:
            return None
        run = self._arena.reserve(n_tokens) if self._arena is not None else None
        if self._arena is not None and run is None:  # enough in all, but in pieces
            return None
        reserved = Reserved(n_tokens, run)
        self._held.add(reserved)
        self.n_reserved += n_tokens
        return reserved

    def release(self, reserved: Reserved) -> None:
        """Take back a request's room. Raises `KeyError` for room that is not reserved."""
        self._held.remove(reserved)
        self.n_reserved -= reserved.n_tokens
        if reserved.run is not None:
            reserved.run.arena.release(reserved.run)

    def check(self) -> None:
        """Raise `AssertionError` unless the ledger says what its requests and the arena say."""
        assert self.n_reserved == sum(reserved.n_tokens for reserved in self._held)
        assert self.n_tokens is None or self.n_reserved <= self.n_tokens
        if self._arena is not None:
            self._arena.check()
            assert self._arena.n_tokens - self._arena.n_free == self.n_reserved
