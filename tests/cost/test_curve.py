"""Curves: what an expert's seconds may look like, and what they may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cost.model import Curve

seconds = st.floats(0.0, 1.0)


@st.composite
def ascending(draw: st.DrawFn) -> Curve:
    rows = sorted(draw(st.sets(st.integers(1, 1000), min_size=1, max_size=8)))
    times = sorted(draw(st.lists(seconds, min_size=len(rows), max_size=len(rows))))
    return Curve(tuple((float(n), s) for n, s in zip(rows, times, strict=True)))


@given(ascending())
def test_a_curve_goes_through_its_points(curve: Curve) -> None:
    for n, s in curve.points:
        assert curve(n) == pytest.approx(s, abs=1e-12)


@given(ascending(), st.floats(0.1, 2000.0), st.floats(0.1, 2000.0))
def test_more_rows_never_take_less(curve: Curve, a: float, b: float) -> None:
    assert curve(min(a, b)) <= curve(max(a, b)) + 1e-12


@given(ascending(), st.floats(0.01, 1.0))
def test_a_curve_is_flat_below_its_first_point(curve: Curve, share: float) -> None:
    n, s = curve.points[0]
    assert curve(share * n) == s


@given(ascending())
def test_no_rows_take_nothing(curve: Curve) -> None:
    assert curve(0) == 0.0


def test_between_and_beyond_its_points() -> None:
    curve = Curve(((1.0, 2.0), (3.0, 4.0), (5.0, 10.0)))
    assert curve(2) == 3.0
    assert curve(4) == 7.0
    assert curve(7) == 16.0, "at the slope of the last piece"


def test_a_single_point_is_a_constant() -> None:
    assert Curve(((4.0, 2.0),))(400) == 2.0


@pytest.mark.parametrize("rows", [(), (1, 1), (2, 1)])
def test_points_ascend(rows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        Curve(tuple((float(n), 1.0) for n in rows))


@given(seconds, seconds, st.floats(1e-3, 1.0), st.integers(1, 4096))
def test_a_roofline_is_the_longer_of_reading_and_computing(
    fixed_s: float, read_s: float, row_s: float, n: int
) -> None:
    assert Curve.roofline(fixed_s, read_s, row_s)(n) == pytest.approx(fixed_s + max(read_s, n * row_s))


def test_a_roofline_without_computing_is_flat() -> None:
    assert Curve.roofline(0.5, 1.0, 0.0)(1000) == 1.5


def test_scaled() -> None:
    curve = Curve(((1.0, 2.0), (3.0, 4.0)))
    assert curve.scaled(0.5)(5) == curve(5) / 2
