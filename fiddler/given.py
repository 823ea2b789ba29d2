"""Values as callers give them: read as plain numbers, and shown in messages, whatever their own methods do."""

from decimal import Decimal
from numbers import Integral, Real
from typing import Any

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
