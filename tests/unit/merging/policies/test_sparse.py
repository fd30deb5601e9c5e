"""TIES and DARE work on the dense products, never on A and B separately."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lte_ray.errors import ConfigError
from lte_ray.merging import Dare, Ties
from lte_ray.merging.policies.elementwise import keep_largest
from tests.support.numerics import assert_near
from tests.support.plans import plan_from_shapes
from tests.support.policies import PLAN, dense_changes, make_pending, make_roster

NEAR = 1e-13
"""A few float64 products of inner size 4 and sums of some contributions."""


def ties_by_hand(changes: Tensor, density: float) -> Tensor:
    """Trim each layer of each change, elect signs, average those that agree (Yadav et al. 2023, algorithm 1)."""
    parts = []
    for entry in PLAN.base.entries:
        part = changes[:, entry.offset : entry.offset + entry.size].clone()
        for row in part:
            kept = row.abs().argsort(descending=True)[: max(1, round(density * entry.size))]
            row[~torch.isin(torch.arange(entry.size), kept)] = 0
        elected = []
        for column in part.t():
            agreeing = [float(x) for x in column if float(x) * float(column.sum()) > 0]
            elected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
        parts.append(torch.tensor(elected, dtype=torch.float64))
    return torch.cat(parts)


@given(st.integers(1, 5), st.integers(0, 99), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_ties_is_the_papers_algorithm_on_products(heads: int, seed: int, density: float) -> None:
    """Layer by layer; k/N times the disjoint mean."""
    pending = make_pending(heads, seed)
    expected = ties_by_hand(dense_changes(pending), density) * heads / 6
    assert_near(Ties(density=density).merge(pending, make_roster(6)).change, expected, NEAR)


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_the_largest_are_kept_with_all_their_equals(values: list[float], share: float) -> None:
    """At least the given fraction, nothing smaller than a dropped value, and the values unchanged."""
    given_, found = torch.tensor(values), keep_largest(torch.tensor(values), share)
    kept = found == given_
    assert bool((found[~kept] == 0).all())
    assert int(kept.sum()) >= max(1, round(share * len(values)))
    if not bool(kept.all()):
        assert float(given_[~kept].abs().max()) < float(found.abs()[found != 0].min())


def test_dare_drops_by_elements_of_the_product_and_scales_the_rest() -> None:
    """Each element of one head's change is dropped, or D / ((1 - p) N)."""
    pending = make_pending(1)
    found = Dare(drop=0.75).merge(pending, make_roster(2)).change
    scaled = dense_changes(pending)[0] * 4 / 2
    dropped = found == 0
    assert_near(found[~dropped], scaled[~dropped], NEAR)
    assert 0 < int(dropped.sum()) < found.numel()


def test_dare_is_the_average_in_expectation() -> None:
    """The mean over seeds is within 5 standard errors of the mean change in each element."""
    plan = plan_from_shapes([(3, 3, 2)], [(2,)])
    pending, runs, drop = make_pending(2, plan=plan), 2000, 0.4
    changes = dense_changes(pending)
    found = torch.stack([Dare(drop=drop, seed=seed).merge(pending, make_roster(2, plan=plan)).change for seed in range(runs)])
    deviation = (changes.square().sum(dim=0) / 4 * drop / (1 - drop)).sqrt()  # of a sum of two Bernoulli variables
    assert bool(((found.mean(dim=0) - changes.mean(dim=0)).abs() <= 5 * deviation / runs**0.5).all())


def test_dares_masks_depend_on_seed_version_head_and_layer_alone() -> None:
    """Equal ones give the same mask, changing any one gives another; other heads don't matter."""
    pending = make_pending(2, same=True)

    def mask(seed: int, version: int, head: int) -> Tensor:
        return Dare(seed=seed).merge([pending[head]], make_roster(1, version=version)).change == 0

    first = mask(0, 7, 0)
    assert torch.equal(mask(0, 7, 0), first)
    assert not any(torch.equal(each, first) for each in (mask(1, 7, 0), mask(0, 8, 0), mask(0, 7, 1)))
    both = Dare().merge(pending, make_roster(1)).change
    alone = [Dare().merge([p], make_roster(1)).change for p in pending]
    assert_near(both, alone[0] + alone[1], NEAR)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Ties(density=0), "--policy.density is 0, but it must be above 0 and at most 1."),
        (lambda: Dare(drop=1.0), "--policy.drop is 1.0, but it must be at least 0 and below 1."),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], says: str) -> None:
    """The error names the flag, the value and the range."""
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value) == says
