"""Groups of options as dataclasses, and errors in the words of a shell.

A command is written as `def inspect(checkpoint: CheckpointOptions, output: InspectOptions) -> None`; `flattened`
shows typer one option for each field of both. The library's errors name options as Python does, `name=value`;
`spoken` turns that into `--name value`.
"""

import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import wraps
from shlex import quote
from typing import Any, get_type_hints

from fiddler.errors import ConfigError

_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\([^)]*\)|[^\s,;:()]+"""
_ELSEWHERE = ("fiddler.attach(", "model.generate(")
"""Pattern of advice that is meant for programs."""


@dataclass(frozen=True, slots=True)
class Flag:
    """The spelling of an option in a shell."""

    on: str
    off: str | None = None
    """Flag that turns a switch off, where it can be set either way."""

    def given(self, text: str) -> str:
        """Return the flag with a value, which is written as Python writes it."""
        value: Any = text
        with suppress(ValueError, SyntaxError):
            value = literal_eval(text)
        if isinstance(value, bool):
            return self.on if value else self.off or f"no {self.on}"
        values = value if isinstance(value, list | tuple) else [value]
        return " ".join(f"{self.on} {quote(v) if isinstance(v, str) else v}" for v in values)


_flags: ContextVar[Mapping[str, Flag]] = ContextVar("flags", default={})  # noqa: B039


@contextmanager
def speaking(kinds: Iterable[Any]) -> Generator[None]:
    """Let errors name options by the flags that these dataclasses make."""
    token = _flags.set(_read(kinds))
    try:
        yield
    finally:
        _flags.reset(token)


def _read(kinds: Iterable[Any]) -> dict[str, Flag]:
    flags = {}
    for kind in kinds:
        hints = get_type_hints(kind, include_extras=True)
        for name in (f.name for f in fields(kind)):
            declared = getattr(hints[name].__metadata__[0], "param_decls", None) or ()
            long = next((text for text in declared if text.startswith("--")), None)
            plain = f"--{name.replace('_', '-')}"
            two_way = long is None and bool in getattr(
                hints[name].__origin__, "__args__", (hints[name].__origin__,)
            )
            flags[name] = Flag(long or plain, f"--no-{plain[2:]}" if two_way else None)
    if "stop" in flags:  # the library's names for these two are others
        flags["stop_strings"] = flags["stop"]
    if "greedy" in flags:
        flags["do_sample"] = Flag("no --greedy", "--greedy")
    return flags


@contextmanager
def giving(flag: str) -> Generator[None]:
    """Let errors raised inside begin with this flag."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error


def spoken(message: str) -> str:
    """Return an error's message with flags in the place of keywords, without advice for programs.

    A name of one word counts only beside `=` or after "set": it may be a word of the sentence.
    """
    clauses = message.split("; ")
    message = "; ".join(c for c in clauses if not any(text in c for text in _ELSEWHERE)) or message
    flags = _flags.get()
    if not flags:
        return message
    names = "|".join(sorted(flags, key=len, reverse=True))
    parts = "|".join(sorted((name for name in flags if "_" in name), key=len, reverse=True)) or r"(?!)"
    message = re.sub(rf"(?<![\w./-])({names})=({_VALUE})", lambda m: flags[m[1]].given(m[2]), message)
    message = re.sub(rf"(?<![\w./-])({parts})(?![\w=/])", lambda m: flags[m[1]].on, message)
    return re.sub(rf"\bset ({names})(?= (?:to|higher|lower)\b)", lambda m: f"set {flags[m[1]].on}", message)


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command as typer is to see it; every parameter must be a dataclass whose fields have defaults."""
    groups = {name: kind for name, kind in get_type_hints(command).items() if is_dataclass(kind)}
    parameters = [p for kind in groups.values() for p in _parameters(kind)]

    @wraps(command)
    def call(**options: Any) -> None:
        with speaking(groups.values()):
            command(
                **{
                    name: kind(**{f.name: options[f.name] for f in fields(kind)})  # type: ignore[operator]
                    for name, kind in groups.items()
                }
            )

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _parameters(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name])
        for f in fields(kind)
    ]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
