"""A few cases instead of a full product: whatever two values can do together, they do in one of them."""

from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any


def covering(
    *axes: Iterable[Any], strength: int = 2, where: Callable[..., bool] = lambda *_: True
) -> list[tuple[Any, ...]]:
    """Return cases, one value of each axis in each, that hold every combination of `strength` axes' values.

    Left out are cases for which `where` is false, and so the combinations that stand in no other. `strength` is 1
    where axes have nothing to do with each other, 2 for faults that take two values at once, 3 for three; with as
    many as there are axes it is the full product. The same axes give the same cases in the same order, in which the
    first are the most different: each case is the one that holds most of what is still missing. All cases are tried
    for that, so the product may have thousands, not millions.
    """
    values = [list(axis) for axis in axes]
    wanted: dict[tuple[tuple[int, int], ...], int] = {}
    held: dict[tuple[int, ...], int] = {}
    for case in product(*(range(len(axis)) for axis in values)):
        if where(*(axis[i] for axis, i in zip(values, case, strict=True))):
            # a bit for each combination: values may have no hash
            bits = [wanted.setdefault(part, len(wanted)) for part in combinations(enumerate(case), strength)]
            held[case] = sum(1 << bit for bit in bits)
    missing, chosen = (1 << len(wanted)) - 1, []
    while missing:
        case = max(held, key=lambda case: (held[case] & missing).bit_count())
        missing &= ~held[case]
        chosen.append(tuple(axis[i] for axis, i in zip(values, case, strict=True)))
    return chosen


def spread(groups: Iterable[Iterable[Any]], values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return pairs for groups of names that are treated alike: every name once, and every value in every group."""
    tried = list(values)
    return [case for names in groups for case in covering(names, tried, strength=1)]
