"""Chat messages, held against what a model of text can take before its template sees them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fiddler.errors import PromptError

_PART = "{'type': 'text', 'text': …}"
_TEXT_PARTS = frozenset({"text", "thinking", "reasoning"})
_TOOL_ROLES = frozenset({"tool", "function", "ipython", "observation"})
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys that stand in place of the content of an assistant."""
_MEDIA = frozenset(
    [f"{before}{kind}{after}" for kind in ("image", "video", "audio", "file") for before in ("", "input_")
     for after in ("", "s", "_url", "_urls", "_file", "_id", "_data")]
    + ["media", "attachment", "attachments", "pixel_values", "document", "documents"]
)  # fmt: skip
"""Names of media, as types of message parts and as keys of messages."""


def plain(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages as the template sees them: plain values, keys without a value left out, as transformers does.

    Raises `PromptError` for what is no message, and for parts that are no text: templates drop those silently.
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
    """Whether a value says that there is nothing; an array is asked nothing."""
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
