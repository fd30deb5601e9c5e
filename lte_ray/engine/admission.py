"""What makes a contribution impossible to merge, one reason a function; empty texts where nothing is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from lte_ray.engine.elsewhere import Measured
from lte_ray.messages import Contribution

ABSURD = 1e30
"""Bound on s times a contribution's sum of squares, and so on every element of s B A: far beyond any weight that trains,
and far below what overflows float32, so that a merge that has begun can't make the base infinite."""


def stale(c: Contribution, run: str, newest: tuple[int, int], version: int) -> str:
    """Why it isn't of this run, this incarnation and this time.

    Args:
        newest: incarnation and sequence of the head's that were received last.
        version: of the base.
    """
    if c.run != run:
        return f"it belongs to run {c.run!r}, not {run!r}"
    if c.sequence < 1:
        return f"its sequence is {c.sequence}, but a head counts its contributions from 1"
    if (c.incarnation, c.sequence) <= newest or c.incarnation < newest[0]:
        return f"incarnation {c.incarnation} sequence {c.sequence} of head {c.head} was received before, or is older"
    if c.version > version:
        return f"it was trained on version {c.version}, but the newest is {version}"
    return ""


def misshapen(buffer: Tensor | Measured, size: int, dtype: torch.dtype) -> str:
    """Why it isn't a flat contribution of the head's plan; shards have checked their parts' sizes when they decoded them."""
    if isinstance(buffer, Measured) or (buffer.shape == (size,) and buffer.dtype == dtype):
        return ""
    return f"it has the shape {tuple(buffer.shape)} and the type {buffer.dtype}, expected {(size,)} and {dtype}"


def squares(buffer: Tensor | Measured) -> float:
    """The sum of squares of its elements."""
    return buffer.squares if isinstance(buffer, Measured) else float(torch.dot(buffer, buffer))


def poisonous(total: float, scaling: float) -> str:
    """Why it would spoil the base.

    Args:
        total: its sum of squares.
        scaling: the largest s of a layer: s times the sum of squares bounds each element of s B A.
    """
    bound = scaling * total  # NaN and infinity show in it, too
    if bound < ABSURD:
        return ""
    return f"it holds values that are NaN, infinite or absurdly large (s times the sum of squares: {bound:g})"
