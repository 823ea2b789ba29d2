"""A prompt as its caller gives it, and the engine's own copy of it.

The copy is made when a request is submitted, in the caller's thread: what he changes later changes nothing, and no
other thread reads his objects.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from operator import index
from typing import Any

import numpy as np
from torch import Tensor

from fiddler.errors import PromptError

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids (a 1-d array or tensor too), or chat messages (`{"role": …, "content": …}`)."""
Copied = str | list[int] | list[dict[str, Any]]

_KINDS = "prompt must be text, token ids (whole numbers from 0) or chat messages"
_DEEPEST = 100
"""Messages may lie in each other so deep; what contains itself has no bottom."""
_MOST_PARTS = 1_000_000
"""Values of all messages together. A conversation of as many tokens has fewer."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The most tokens that a prompt and its completion may have together, and the option that says so."""

    longest: int
    name: str = "what fits"
    remedy: str = ""

    @classmethod
    def of(cls, max_context: int, kv_tokens: int | None) -> "Bound":
        """Return the smaller of a context and of the room for keys and values, `None` without limit."""
        if kv_tokens is not None and kv_tokens < max_context:
            return cls(kv_tokens, f"kv_tokens={kv_tokens}", ", or set kv_tokens higher")
        return cls(max_context, f"the context of {max_context}")

    def exceeded(self, n_tokens: int, *, counted: bool = True) -> PromptError:
        """Return the error of a prompt that has so many tokens, or more where they are not counted."""
        n = f"{n_tokens}" if counted else f"at least {n_tokens}"
        return PromptError(
            f"the prompt is too long: {n} tokens leave no room within {self.name}; shorten it{self.remedy}"
        )


_NO_BOUND = Bound(sys.maxsize)


def copy_prompt(prompt: Prompt, bound: Bound = _NO_BOUND) -> Copied:
    """Return a copy that shares nothing with the prompt that can change.

    A sequence of more items than `bound` is refused before it is copied. Raises
    `PromptError` for another kind of object, and for one that raises while it is read.
    """
    try:
        return _copy(prompt, bound)
    except (PromptError, KeyboardInterrupt):
        raise
    except BaseException as error:  # of the caller's objects, whose code may raise anything
        raise PromptError(f"the prompt cannot be read: {type(error).__name__}: {error}") from error


def _copy(prompt: Any, bound: Bound) -> Copied:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, np.ndarray | Tensor):
        return _row(prompt, bound)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise PromptError(f"{_KINDS}, not {type(prompt).__name__}")
    n_items = len(prompt)
    if n_items > bound.longest:
        raise bound.exceeded(n_items)
    items = _items(prompt, n_items)
    if items and isinstance(items[0], Mapping):
        return _Messages().copy(items)
    return _ids(items)


def _row(row: Any, bound: Bound) -> list[int]:
    """Return the ids of an array or tensor."""
    if row.ndim != 1:
        raise PromptError(f"token ids must be in one row, not of shape {list(row.shape)}; give them one by one")
    if len(row) > bound.longest:
        raise bound.exceeded(len(row))
    return _ids(row.tolist())


def _ids(items: Sequence[Any]) -> list[int]:
    """Return whole numbers as Python's own: numpy's and a tensor's are taken for what they are."""
    try:
        ids = [index(item) for item in items]
    except TypeError:
        ids = [-1]
    if any(i < 0 for i in ids) or any(isinstance(item, bool) for item in items):
        raise PromptError(_KINDS)
    return ids


def _items(several: Collection[Any], n_items: int) -> list[Any]:
    """Return as many items as a collection says that it has; its iterator may know no end."""
    items = list(islice(several, n_items))
    if len(items) != n_items:
        raise PromptError(f"a {type(several).__name__} says that it has {n_items} items, and has {len(items)}")
    return items


class _Messages:
    """Copies a conversation: mappings as `dict`, sequences as `list` or `tuple`, whatever else by `deepcopy`."""

    def __init__(self) -> None:
        self._n_parts = 0

    def copy(self, messages: Sequence[Any]) -> list[dict[str, Any]]:
        if not all(isinstance(message, Mapping) for message in messages):
            raise PromptError("chat messages must all be mappings: {'role': …, 'content': …}")
        return [dict(self._pairs(message, 1)) for message in messages]

    def _pairs(self, mapping: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
        for key in self._items(mapping):
            yield key, self._value(mapping[key], depth)

    def _items(self, several: Collection[Any]) -> list[Any]:
        self._n_parts += len(several)
        if self._n_parts > _MOST_PARTS:
            raise PromptError(f"the messages hold more than {_MOST_PARTS} values; give fewer")
        return _items(several, len(several))

    def _value(self, value: Any, depth: int) -> Any:
        if depth > _DEEPEST:
            raise PromptError(f"the messages lie more than {_DEEPEST} deep in each other; give plain ones")
        match value:
            case str() | bytes() | int() | float() | None:
                return value
            case Mapping():
                return dict(self._pairs(value, depth + 1))
            case Sequence():
                copied = [self._value(item, depth + 1) for item in self._items(value)]
                return tuple(copied) if isinstance(value, tuple) else copied
            case _:
                return deepcopy(value)
