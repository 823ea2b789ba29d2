"""A conversation that is kept within the model's context."""

from fiddler.cli.session import DEFAULT_NEW_TOKENS
from fiddler.engine.engine import Engine


class History:
    """The messages so far. Where they grow too long, the oldest turns go; the system message stays.

    `n_wanted` is the length of answers that room is kept for, as far as a quarter of the context.
    Raises `PromptError` where the checkpoint has no chat template.
    """

    def __init__(self, engine: Engine, system: str | None, n_wanted: int | None) -> None:
        self._engine = engine
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._n_wanted = DEFAULT_NEW_TOKENS if n_wanted is None else n_wanted
        engine.count_tokens([{"role": "user", "content": "?"}])

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages for the model."""
        return [*self._system, *self._turns]

    @property
    def n_answer(self) -> int:
        """Tokens the next answer may have; at least 1, so that an impossible prompt is refused by the engine."""
        return max(min(self._n_wanted, self._room()), 1)

    def ask(self, question: str) -> int:
        """Add the user's message; returns how many old messages were dropped for it."""
        self._turns.append({"role": "user", "content": question})
        n_kept_free = min(self._n_wanted, self._engine.max_context // 4)
        n_dropped = 0
        while len(self._turns) > 1 and self._room() < n_kept_free:
            del self._turns[:2]
            n_dropped += 2
        return n_dropped

    def reply(self, text: str, *, kept: bool) -> None:
        """Add the model's message, or forget the question if nothing is to be `kept`."""
        if kept:
            self._turns.append({"role": "assistant", "content": text})
        else:
            self.forget_question()

    def forget_question(self) -> None:
        """Take back a question that was not answered."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns.clear()

    def _room(self) -> int:
        return self._engine.max_context - self._engine.count_tokens(self.messages)
