"""Whether every expert's tensors are what the model computes with, from the headers alone."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from fiddler.errors import CheckpointError
from fiddler.store.checkpoint import EXPERT_DTYPES, EXPERT_NAMES, Entry
from fiddler.store.mapped import Every, Select, Step, Transpose, View

Shape = tuple[int, ...]


def check_views(
    parameter: str, due: Shape, experts: Sequence[tuple[View, ...]], entries: Mapping[str, Entry]
) -> None:
    """Hold the views that make each expert's part of a parameter against the shape `due`, `[out, in]` or `[out]`.

    An expert has one view, or two halves along `out`. Raises `CheckpointError`, which names the tensor and both
    shapes, and for numbers that are no floats of 16 bits or more.
    """
    for views in experts:
        out, *rest = due
        share = (out // len(views), *rest) if out % len(views) == 0 else None
        for view in views:
            entry = entries[view.tensor]
            if entry.dtype not in EXPERT_DTYPES:
                raise CheckpointError(
                    f"tensor {view.tensor!r} is {entry.dtype}; experts must be {EXPERT_NAMES}: use a checkpoint "
                    "that is not quantised"
                )
            if share is None or _seen(entry.shape, view.steps) != share:
                raise CheckpointError(_complaint(parameter, due, views, view, entry))


def _complaint(parameter: str, due: Shape, views: tuple[View, ...], view: View, entry: Entry) -> str:
    part = "" if len(views) == 1 else f" and this is a part of {len(views)}"
    found = _seen(entry.shape, view.steps)
    seen = "" if found == entry.shape else f" ({_named(found)} for an expert)"
    return (
        f"tensor {view.tensor!r} is {_named(entry.shape)}{seen} where {parameter} has {_named(due)} an "
        f"expert{part}; config.json and the weights are not of one model, or damaged: download the checkpoint again"
    )


def _named(shape: Shape | None) -> str:
    return "no matrix" if shape is None else str(list(shape))


@lru_cache(maxsize=1 << 10)
def _seen(shape: Shape, steps: tuple[Step, ...]) -> Shape | None:
    """Return the shape of a view of a tensor of `shape`; `None` where the steps cannot be taken."""
    for step in steps:
        match step, shape:
            case Select(index), (n, *rest) if index < n:
                shape = tuple(rest)
            case Transpose(), (rows, columns):
                shape = columns, rows
            case Every(0, start), (n, *rest):
                shape = ((n - start + 1) // 2, *rest)
            case Every(1, start), (rows, n):
                shape = rows, (n - start + 1) // 2
            case _:
                return None
    return shape
