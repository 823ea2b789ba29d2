"""Few cases hold as much as is said of them: every combination of two values, or three, that any case may hold."""

from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.covering import covering, spread


def parts(cases: list[tuple[Any, ...]], strength: int) -> set[tuple[tuple[int, Any], ...]]:
    """Every combination of so many axes' values that stands in some case."""
    return {part for case in cases for part in combinations(enumerate(case), strength)}


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), strength=st.integers(1, 3), data=st.data())
def test_every_combination_that_is_allowed_stands_in_a_case(
    sizes: list[int], strength: int, data: st.DataObject
) -> None:
    axes = [range(n) for n in sizes]
    product_of_all = list(product(*axes))
    refused = data.draw(st.sets(st.sampled_from(product_of_all), max_size=20))
    cases = covering(*axes, strength=strength, where=lambda *case: case not in refused)
    allowed = [case for case in product_of_all if case not in refused]
    assert set(cases) <= set(allowed)
    assert parts(cases, strength) == parts(allowed, strength)
    assert len(cases) == len(set(cases))


@pytest.mark.parametrize(
    ("sizes", "strength", "at_most"),
    [((5, 2, 2, 2, 2, 2, 3), 2, 18), ((5, 2, 2, 2, 2, 2, 3), 3, 45), ((8, 3, 2, 2), 2, 24), ((22, 8), 1, 22)],
)
def test_there_are_few(sizes: tuple[int, ...], strength: int, at_most: int) -> None:
    assert len(covering(*map(range, sizes), strength=strength)) <= at_most


def test_with_as_many_as_there_are_axes_it_is_the_full_product() -> None:
    assert sorted(covering("ab", "cd", "ef", strength=3)) == list(product("ab", "cd", "ef"))


def test_the_same_axes_give_the_same_cases() -> None:
    first, second = (covering("abc", range(3), [True, False]) for _ in range(2))
    assert first == second
    assert first[0] == ("a", 0, True)


def test_names_that_are_treated_alike_share_the_values() -> None:
    assert spread([["a", "b"], "c"], (1, 2, 3)) == [
        *(("a", 1), ("b", 2), ("a", 3)),
        *(("c", 1), ("c", 2), ("c", 3)),
    ]


def test_values_need_neither_hash_nor_equality() -> None:
    odd = [[], {}, float("nan")]
    assert [id(value) for value, _ in covering(odd, "a")] == [id(value) for value in odd]
