"""Reads saved state from JSON, and raises `ValueError` for anything that does not fit: it may be another run's."""

from collections.abc import Mapping, Sequence

from fiddler.given import shown

_LIMIT = 1e18  # nothing that is counted here gets there; also keeps out nan, inf and endless integers


def text(state: Mapping[str, object], field: str) -> str:
    """A string; ValueError where there is none."""
    value = state.get(field)
    if not isinstance(value, str):
        raise ValueError(f"saved {field!r} is not a string")
    return value


def part(state: Mapping[str, object], field: str) -> Mapping[str, object]:
    """A nested object; ValueError where there is none."""
    value = state.get(field)
    if not isinstance(value, dict):
        raise ValueError(f"saved {field!r} is not an object")
    return value


def number(state: Mapping[str, object], field: str) -> float:
    """One finite number; ValueError where there is none."""
    return _finite(state.get(field), field)


def table(
    state: Mapping[str, object], field: str, shape: Sequence[int], *, blank: float | None = None
) -> list[list[float]]:
    """Return rows of finite numbers, row `i` with `shape[i]` entries; null becomes `blank`, if one is given.

    Raises `ValueError` for anything else.
    """
    rows = state.get(field)
    if not isinstance(rows, list) or [len(row) if isinstance(row, list) else -1 for row in rows] != list(shape):
        raise ValueError(f"saved {field!r} is not a table of {list(shape)} entries")
    return [
        [blank if value is None and blank is not None else _finite(value, field) for value in row] for row in rows
    ]


def counts(state: Mapping[str, object], field: str, shape: Sequence[int]) -> list[list[int]]:
    """A table of whole numbers from 0 on; ValueError otherwise."""
    rows = table(state, field, shape)
    if any(value < 0 or value != int(value) for row in rows for value in row):
        raise ValueError(f"saved {field!r} holds something that is no count")
    return [[int(value) for value in row] for row in rows]


def _finite(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LIMIT < value < _LIMIT:
        raise ValueError(f"saved {field!r} holds {shown(value)} where a finite number belongs")
    return value
