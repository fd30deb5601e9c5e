"""How heads' changes relate, against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.merging.alignment import effective_rank, measure_changes
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.low_rank import Share
from tests.support.plans import plan_from_shapes, random_flat
from tests.support.policies import dense_changes, make_pending


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_measures_are_those_of_the_dense_changes(shapes: list[tuple[int, int, int]], heads: int, seed: int) -> None:
    """Cosines of whole changes, and the participation ratio of the squared singular values of the mean of each weight."""
    plan = plan_from_shapes(shapes, [(3,)], scaling=1.5)
    pending = make_pending(heads, seed, plan=plan, referenced=seed % 2 == 0)
    changes = dense_changes(pending).double()
    measured = measure_changes({2 * p.head: p.share for p in pending})  # heads keep their numbers
    cosines = torch.nn.functional.cosine_similarity(changes[:, None], changes[None, :], dim=2)
    expected = {2 * n: float(cosines[n].sum() - 1) / (heads - 1) for n in range(heads)} if heads > 1 else {}
    assert measured.alignment == pytest.approx(expected, abs=1e-6)
    parts = views(plan.base, changes.mean(0))
    ranks = []
    for adapted in plan.adapted:
        squares = torch.linalg.svdvals(parts[adapted.name]).square()
        ranks.append(float(squares.sum() ** 2 / squares.square().sum()))
    assert measured.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 12, 4), (6, 12, 9), (12, 6, 9)])
def test_equal_singular_values_count_fully(shape: tuple[int, int, int]) -> None:
    """Whether the inner size is the smallest one, or the output, or the input."""
    out, size, inner = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64))[0][:, :3]
    right = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0][:3]
    b = torch.zeros(out, inner, dtype=torch.float64)
    a = torch.zeros(inner, size, dtype=torch.float64)
    b[:, :3], a[:3] = left, right
    assert effective_rank(b, a) == pytest.approx(3)
    b[:, 1:3] *= 1e-3
    assert effective_rank(b, a) == pytest.approx(1, abs=1e-5)
    assert math.isnan(effective_rank(0 * b, a))


def test_heads_that_change_nothing_have_no_alignment() -> None:
    """Nor has their mean a rank. Equal and opposite changes have cosines 1 and -1."""
    plan = plan_from_shapes([(4, 3, 2)], [(2,)])
    buffer = random_flat(plan.contribution.size, 1)
    nothing = measure_changes({0: Share(1.0, plan, 0 * buffer, None), 1: Share(1.0, plan, 0 * buffer, None)})
    assert all(map(math.isnan, nothing.alignment.values()))
    assert nothing.effective_rank is None
    same = measure_changes({0: Share(1.0, plan, buffer, None), 1: Share(1.0, plan, buffer.clone(), None)})
    assert same.alignment == pytest.approx({0: 1.0, 1: 1.0})
