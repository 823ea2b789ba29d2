"""Reads values and JSON files that come from outside.

Numbers and flags of callers become Python's own, and messages show values safely, whatever the values' own methods
do. JSON files are read whole, with a limit, only from regular files.
"""

import json
import os
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

_WIDEST = 80
"""Characters of a value that a message shows."""


def whole_number(value: Any) -> int | None:
    """Return a whole number of Python's, NumPy's or torch's as an `int`; `None` for all else, flags included."""
    plain = _plain(value)
    return None if isinstance(plain, bool) or not isinstance(plain, Integral) else int(plain)


def real_number(value: Any) -> float | None:
    """Return a number of Python's, NumPy's or torch's as a `float`; `None` for one too large and for all else."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Real | Decimal):
        return None
    try:
        return float(plain)
    except (OverflowError, ValueError):  # ValueError: a Decimal that signals
        return None


def flag(value: Any) -> bool | None:
    """Return Python's or NumPy's `True` or `False` as a `bool`; `None` for anything else, 0 and 1 included."""
    plain = _plain(value)
    return plain if isinstance(plain, bool) else None


def _plain(value: Any) -> Any:
    """Return the one element of an array or tensor, and anything else as it is."""
    try:
        return value.item()
    except Exception:  # it has none, several, or is no array; or it is an object that raises
        return value


def shown(value: Any) -> str:
    """Return a value as messages show it: in one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of more than 4300 digits; an object that raises
        return f"<{type(value).__name__}>"
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


MOST_BYTES = 1 << 28
"""Limit for a JSON file. The index of a checkpoint of a million tensors takes half of it."""


def read_json(file: Path) -> Any:
    """Return the value in a file.

    Raises `OSError` where it cannot be read, and `ValueError` where it is a pipe or a device, larger than
    `MOST_BYTES`, not UTF-8, not JSON, or nested deeper than Python reads.
    """
    with open_regular(file) as stream:
        n_bytes = os.fstat(stream.fileno()).st_size
        if n_bytes > MOST_BYTES:
            raise ValueError(f"{file.name} has {n_bytes} bytes")
        text = stream.read().decode("utf-8")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deeply") from None


def open_regular(file: Path) -> BinaryIO:
    """Open a file for its bytes; a pipe that has just taken its name is not waited for.

    Raises `OSError` where it cannot be opened, and `ValueError` where it is a pipe or a device.
    """
    stream = open(file, "rb", opener=lambda path, flags: os.open(path, flags | _AT_ONCE))  # noqa: SIM115
    if not S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError(f"{file.name} is not a regular file")
    return stream


_AT_ONCE = getattr(os, "O_NONBLOCK", 0)
