"""A prompt: the engine's own copy of it, and the check that messages are of text.

The copy is made when a request is submitted, in the caller's thread: later changes of the caller's objects change
nothing, and no other thread reads them. Chat messages are checked before the template sees them, since templates
drop parts silently.
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

_PART = "{'type': 'text', 'text': …}"
_TEXT_PARTS = frozenset({"text", "thinking", "reasoning"})
_TOOL_ROLES = frozenset({"tool", "function", "ipython", "observation"})
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's message that may replace its content."""
_MEDIA = frozenset(
    [f"{before}{kind}{after}" for kind in ("image", "video", "audio", "file") for before in ("", "input_")
     for after in ("", "s", "_url", "_urls", "_file", "_id", "_data")]
    + ["media", "attachment", "attachments", "pixel_values", "document", "documents"]
)  # fmt: skip
"""Names of media, as types of message parts and as keys of messages."""


def plain(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages as the template sees them: plain values, keys without a value left out, as transformers does.

    Raises `PromptError` for a value that is no message and for parts that are no text: templates drop those
    silently.
    """
    try:
        return _checked(messages)
    except RecursionError:
        raise PromptError("the messages are nested too deeply") from None


def _checked(messages: Sequence[Any]) -> list[dict[str, Any]]:
    found = []
    for i, message in enumerate(messages, start=1):
        where = f"message {i}"
        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise PromptError(f"{where} is of type {kind}; a message is a mapping with a role and content")
        given = {key: value for key, value in message.items() if value is not None}
        try:
            said = {key: _plain(value, where) for key, value in given.items()}
        except PromptError:
            _check(given, where)  # of a picture it is better said where it stands
            raise
        _check(said, where)
        found.append(said)
    return found


def _check(message: dict[str, Any], where: str) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise PromptError(f"{where} has no role; give it one, such as 'user'")
    for key in message:
        if key in _MEDIA and not _empty(message[key]):
            raise PromptError(f"{where} has {key!r}, but this model takes text alone; leave it out")
    if isinstance(content, list | tuple):
        for n, part in enumerate(content, start=1):
            _check_part(part, f"part {n} of {where}", free=role in _TOOL_ROLES)
    elif role in _TOOL_ROLES or isinstance(content, str):
        return  # a tool may have returned any value
    elif content is not None:
        kind = type(content).__name__
        raise PromptError(f"the content of {where} is of type {kind}; it must be text or a list of parts")
    elif not any(message.get(key) for key in _INSTEAD):
        raise PromptError(f"{where} has no content")


def _check_part(part: Any, where: str, *, free: bool) -> None:
    if not isinstance(part, Mapping):
        if isinstance(part, str) or free:
            return
        raise PromptError(f"{where} is of type {type(part).__name__}; a part is {_PART}")
    kind = part.get("type")
    if kind is not None and not isinstance(kind, str):
        raise PromptError(f"{where} has a type that is no text: {kind!r}")
    media = [key for key in part if key in _MEDIA and not _empty(part[key])]
    if kind in _MEDIA or media:
        found = kind if kind in _MEDIA else media[0]
        raise PromptError(f"{where} is {found!r}, but this model takes text alone; leave it out")
    if free:
        return
    if kind not in _TEXT_PARTS and (kind is not None or "text" not in part):
        raise PromptError(f"{where} is of type {kind!r}, but this model takes text alone: {_PART}")
    key = kind or "text"
    if key == "text" and not isinstance(part.get("text"), str):
        raise PromptError(f"{where} has no text; give it as {_PART}")


def _empty(value: Any) -> bool:
    """Whether a value counts as empty; arrays never do, and are not asked."""
    return value is None or (isinstance(value, str | int | list | tuple | Mapping) and not value)


def _plain(value: Any, where: str) -> Any:
    """Return a value made of exactly text, numbers, lists, tuples and dicts: it goes to another process."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(item, where) for item in value)
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    kind = type(value).__name__
    raise PromptError(f"{where} holds a value of type {kind}; messages hold text, numbers, lists and mappings")


Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids (a 1-d array or tensor too), or chat messages (`{"role": …, "content": …}`)."""
Copied = str | list[int] | list[dict[str, Any]]

_KINDS = "prompt must be text, token ids (whole numbers from 0) or chat messages"
_DEEPEST = 100
"""Most levels of nesting in messages; a message that contains itself has no bottom."""
_MOST_PARTS = 1_000_000
"""Most values in all messages together. A conversation of as many tokens has fewer."""


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
        """Return the error of a prompt with this many tokens, or with at least so many if not `counted`."""
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
    """Return whole numbers as Python's own, whether NumPy's or a tensor's."""
    try:
        ids = [index(item) for item in items]
    except TypeError:
        ids = [-1]
    if any(i < 0 for i in ids) or any(isinstance(item, bool) for item in items):
        raise PromptError(_KINDS)
    return ids


def _items(several: Collection[Any], n_items: int) -> list[Any]:
    """Return as many items as a collection claims to have, since its iterator may be endless."""
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
