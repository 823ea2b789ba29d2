"""Frequency over age: the expert with few rows, long ago, goes."""

from typing import ClassVar

from fiddler.cache.history import History
from fiddler.cache.keys import Key
from fiddler.cache.worth import Policy


class Lfru(Policy):
    """Score f / (now - last + 1): rows since the beginning over tokens of its own layer since the last touch."""

    name: ClassVar[str] = "lfru"

    def __init__(self, history: History) -> None:
        self.history = history

    def rank(self, key: Key) -> float:
        """The same as the score."""
        age = self.history.layer_tokens(key[0]) - self.history.last_token(key)
        return self.history.n_rows(key) / (age + 1)
