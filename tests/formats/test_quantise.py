"""Rounding to codes: near the numbers, by the best of the scales that are tried, and refused where it cannot be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiddler.formats.quantise import TARGETS, Target, quantise

HALF_A_STEP = {"int4": 0.5 / 7, "int8": 0.5 / 127, "fp8": 1 / 16}
"""Largest error of a number, as a share of its block's largest; of fp8 as a share of the number itself."""
ROUNDING = 2**-8
"""Of scales, to bfloat16."""


def matrix(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TARGETS)
@given(seed=st.integers(0, 99), out=st.integers(1, 5), groups=st.integers(1, 3))
def test_numbers_come_back(name: str, seed: int, out: int, groups: int) -> None:
    numbers = matrix(out, 32 * groups, seed)
    packed = quantise(numbers, TARGETS[name])
    blocks = numbers.view(out, -1, packed.block[1])
    error = (packed.dense(torch.float32) - numbers).view_as(blocks).square().mean(-1).sqrt()
    assert bool((error <= (HALF_A_STEP[name] + ROUNDING) * blocks.abs().amax(-1)).all())


@pytest.mark.parametrize(("name", "most"), [("int4", 0.10), ("int8", 0.010), ("fp8", 0.03)])
def test_error_of_normal_numbers(name: str, most: float) -> None:
    """Root mean square of the errors beside the numbers'."""
    numbers = matrix(64, 2048)
    assert float((quantise(numbers, TARGETS[name]).dense(torch.float32) - numbers).std()) < most


@pytest.mark.parametrize("name", TARGETS)
def test_numbers_whose_squares_are_too_large_come_back(name: str) -> None:
    numbers = matrix(4, 64)
    numbers[1] *= 1e30
    found, numbers = quantise(numbers, TARGETS[name]).dense(torch.float64), numbers.double()
    assert bool(((found - numbers).norm(dim=1) < 0.12 * numbers.norm(dim=1)).all())


@pytest.mark.parametrize("name", TARGETS)
def test_zeros_stay_zeros(name: str) -> None:
    assert not quantise(torch.zeros(3, 64), TARGETS[name]).dense(torch.float32).any()


def test_the_best_of_several_scales_beats_the_plain_one() -> None:
    target, numbers = TARGETS["int4"], matrix(16, 256) ** 3  # a few large numbers

    def error(by: Target) -> float:
        return float((quantise(numbers, by).dense(torch.float32) - numbers).square().sum())

    assert error(target) < 0.97 * error(replace(target, steps=(1.0,)))


def test_packed_sizes() -> None:
    numbers = matrix(4, 64)
    assert [quantise(numbers, TARGETS[name]).nbytes for name in ("int4", "int8", "fp8")] == [144, 264, 264]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    numbers = matrix(2, 64)
    numbers[1, 3] = value
    with pytest.raises(ValueError, match="finite"):
        quantise(numbers, TARGETS["int8"])


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        quantise(matrix(2, 40), TARGETS["int4"])
