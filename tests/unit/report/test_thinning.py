"""Thinning of curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lte_ray.report.thinning import edges, thin, thin_place


def test_a_short_curve_stays_as_it_is() -> None:
    """At most 2 rows a stretch."""
    column = np.array([3.0, np.nan, 1.0, 2.0])
    bounds = edges(4, 2)
    np.testing.assert_array_equal(thin(column, bounds), column)
    np.testing.assert_array_equal(thin_place(np.arange(4.0), bounds), np.arange(4.0))


def test_each_stretch_keeps_its_lowest_and_highest_value_in_their_order() -> None:
    """One with a peak first, one with a dip first, one without numbers."""
    column = np.array([1.0, 9.0, 2.0, 0.5, 5.0, 5.0, 4.0, 8.0, np.nan, np.nan, np.nan, np.nan])
    bounds = edges(12, 3)
    np.testing.assert_array_equal(thin(column, bounds), [9.0, 0.5, 4.0, 8.0, np.nan, np.nan])
    np.testing.assert_array_equal(thin_place(np.arange(12.0), bounds), [0.0, 3.0, 4.0, 7.0, 8.0, 11.0])


@given(
    arrays.arrays(np.float64, st.integers(1, 300), elements=st.floats(-1e6, 1e6) | st.just(float("nan"))),
    st.integers(1, 40),
)
def test_no_extreme_value_is_lost(column: np.ndarray, stretches: int) -> None:
    """And no value is made up."""
    thinned = thin(column, edges(len(column), stretches))
    known = column[np.isfinite(column)]
    shown = thinned[np.isfinite(thinned)]
    assert len(thinned) <= max(len(column), 2 * stretches)
    assert set(shown.tolist()) <= set(known.tolist())
    if len(known):
        assert (shown.min(), shown.max()) == (known.min(), known.max())
    else:
        assert not len(shown)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_thin(rows: int) -> None:
    """No row, and one."""
    assert len(thin(np.zeros(rows), edges(rows, 10))) == rows
