"""Lets commands share groups of options: typer reads a function's parameters, a group is a dataclass.

A command is written as `def inspect(checkpoint: CheckpointOptions, output: InspectOptions) -> None`; typer sees one
option for each field of both.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from fiddler.cli.flags import speaking


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
