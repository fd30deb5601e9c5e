"""Thins long curves so that no extreme value is lost: each stretch of rows becomes two points, its lowest and highest value."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


def edges(rows: int, stretches: int) -> npt.NDArray[np.int64]:
    """The first rows of equal stretches, and the end. If there are at most 2 rows a stretch, each row is one of its own."""
    if rows <= 2 * stretches:
        return np.arange(rows + 1)
    return np.linspace(0, rows, stretches + 1).astype(np.int64)


def thin(column: Numbers, bounds: npt.NDArray[np.int64]) -> Numbers:
    """Returns the lowest and the highest value of each stretch, in the order in which they come; NaN for one without numbers.

    Args:
        column: a value for each row.
        bounds: from `edges`. Where each row is a stretch of its own, the column is returned as it is.
    """
    if len(bounds) == len(column) + 1:
        return column
    starts, sizes = bounds[:-1], np.diff(bounds)
    lacks = np.isnan(column)
    low = np.minimum.reduceat(np.where(lacks, np.inf, column), starts)
    high = np.maximum.reduceat(np.where(lacks, -np.inf, column), starts)
    low_first = _first_place(column == np.repeat(low, sizes), starts) <= _first_place(column == np.repeat(high, sizes), starts)
    pairs = np.where(low_first[:, None], np.stack([low, high], 1), np.stack([high, low], 1))
    pairs[np.isinf(pairs)] = np.nan
    return pairs.reshape(-1)


def thin_place(column: Numbers, bounds: npt.NDArray[np.int64]) -> Numbers:
    """Returns where the two points of each stretch are drawn: at its first and its last row.

    Args:
        column: where each row is, never decreasing.
        bounds: from `edges`.
    """
    if len(bounds) == len(column) + 1:
        return column
    return np.stack([column[bounds[:-1]], column[bounds[1:] - 1]], 1).reshape(-1)


def mean(column: Numbers) -> float:
    """The mean of the finite numbers, or NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(column)) if len(column) else float("nan")


def _first_place(matches: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The first matching row of each stretch; the number of rows where none matches."""
    rows = len(matches)
    first: npt.NDArray[np.int64] = np.minimum.reduceat(np.where(matches, np.arange(rows), rows), starts)
    return first
