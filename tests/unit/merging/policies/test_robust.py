"""Robust policies, compared with dense arithmetic; and what a bad head can do to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.merging import Average, Clip, Krum, Median, TrimmedMean
from lte_ray.merging.low_rank import Share, gram_matrix, squared_distances
from lte_ray.merging.policies import elementwise
from tests.support.numerics import assert_near
from tests.support.plans import plan_from_shapes, random_flat
from tests.support.policies import PLAN, change_from_decision, dense_change, dense_changes, make_pending, make_roster

NEAR = 1e-13
"""A few float64 products of inner size 4 and sums of some contributions."""


@given(st.integers(1, 7), st.integers(0, 99))
def test_the_median_is_that_of_each_element(heads: int, seed: int) -> None:
    """k/N times the quantile 0.5 of the dense changes, of even numbers the middle two's mean."""
    pending = make_pending(heads, seed)
    expected = torch.quantile(dense_changes(pending), 0.5, dim=0) * heads / 8
    assert_near(Median().merge(pending, make_roster(8)).change, expected, NEAR)


@given(st.integers(1, 9), st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.49]))
def test_the_trimmed_mean_is_that_of_each_element(heads: int, seed: int, trim: float) -> None:
    """k/N times the mean of the sorted changes without floor(trim k) at each end."""
    pending, out = (
        make_pending(heads, seed),
        {0.0: 0, 0.1: 0, 0.25: heads // 4, 1 / 3: heads // 3, 0.49: int(0.49 * heads)}[trim],
    )
    left = dense_changes(pending).sort(dim=0).values[out : heads - out]
    expected = left.mean(dim=0) * heads / 9
    assert_near(TrimmedMean(trim=trim).merge(pending, make_roster(9)).change, expected, NEAR)


def test_trim_counts_heads_not_rounding_errors() -> None:
    """0.1 of 30 contributions is 3 at each end, though 0.1 * 30 may not be 3 in floating point."""
    plan = plan_from_shapes([], [(1,)])
    pending = make_pending(30, plan=plan, referenced=False)
    for i, p in enumerate(pending):
        p.share.contribution.fill_(float(2**i))
    found = TrimmedMean(trim=0.1).merge(pending, make_roster(30, plan=plan)).change
    assert float(found) == pytest.approx(sum(2.0**i for i in range(3, 27)) / 24)


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reducing a layer chunk by chunk changes nothing."""
    pending, roster = make_pending(5), make_roster(5)
    whole = [policy.merge(pending, roster).change for policy in (Median(), TrimmedMean())]
    monkeypatch.setattr(elementwise, "CHUNK", 7)
    assert all(
        torch.equal(policy.merge(pending, roster).change, each)
        for policy, each in zip((Median(), TrimmedMean()), whole, strict=True)
    )


def test_a_transposed_weight_is_laid_out_as_it_is_stored() -> None:
    """Changes of weights stored as in x out, and of several dimensions, are returned in the base's layout."""
    plan = Plan((Adapted("t", (4, 6), 2, 1.5, transposed=True), Adapted("c", (3, 2, 2), 1, 1.0)), (Replica("p", (2,)),))
    pending = make_pending(3, plan=plan)
    expected = torch.stack([p.change() for p in pending]).median(dim=0).values
    assert_near(Median().merge(pending, make_roster(3, plan=plan)).change, expected, NEAR)


ROBUST: list[Callable[[], object]] = [Median, TrimmedMean, lambda: Krum(faulty=1), lambda: Krum(faulty=1, keep=1)]


@pytest.mark.parametrize("make", ROBUST)
@pytest.mark.parametrize("wrong", [0, 2, 4])
def test_one_wrong_head_of_five_cant_move_the_base_far(make: Callable[[], object], wrong: int) -> None:
    """However large its contribution is, the change stays within the range of the good ones; the average doesn't."""
    pending = make_pending(5, referenced=False)
    pending[wrong].share.contribution.mul_(1e6)
    sound = dense_changes([p for p in pending if p.head != wrong])
    found = change_from_decision(make().merge(pending, make_roster(5)), pending)  # type: ignore[attr-defined]
    slack = NEAR * float(sound.abs().max())
    assert bool((found <= sound.max(dim=0).values + slack).all())
    assert bool((found >= sound.min(dim=0).values - slack).all())
    average = change_from_decision(Average().merge(pending, make_roster(5)), pending)
    assert float(average.norm()) > 1e6 * float(sound.norm())


def test_clipping_bounds_a_wrong_head_by_the_others() -> None:
    """Its weighted norm is at most twice the median norm."""
    pending = make_pending(5, referenced=False)
    pending[3].share.contribution.mul_(1e6)
    found = change_from_decision(Clip().merge(pending, make_roster(5)), pending)
    norms = sorted(float(dense_change(p).norm()) for p in pending)
    assert float(found.norm()) <= (sum(norms[:4]) + 2 * norms[2]) / 5 * (1 + NEAR)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)), max_size=3),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_gram_is_that_of_the_dense_changes(shapes: list[tuple[int, int, int]], heads: int, seed: int) -> None:
    """G_ij = <D_i, D_j>, with and without references, with replicas."""
    plan = plan_from_shapes(shapes, [(3,), ()], scaling=1.5)
    pending = make_pending(heads, seed, plan=plan, referenced=seed % 2 == 0)
    changes = dense_changes(pending)
    assert_near(gram_matrix([p.share for p in pending]), changes @ changes.t(), NEAR)
    for p, change in zip(pending, changes, strict=True):
        assert p.norm() == pytest.approx(float(change.norm()), rel=1e-10)  # a root of a difference of products


def test_gram_takes_heads_of_different_ranks() -> None:
    """The base is the same, the factors differ."""
    plans = [plan_from_shapes([(6, 5, rank), (3, 4, 1)], [(4,)], scaling=2.0) for rank in (1, 2, 4)]
    shares = [Share(1.0, plan, random_flat(plan.contribution.size, i), None) for i, plan in enumerate(plans)]
    changes = torch.stack([dense_change(_pending(i, share)) for i, share in enumerate(shares)])
    assert_near(gram_matrix(shares), changes @ changes.t(), NEAR)
    assert_near(squared_distances(shares), torch.cdist(changes, changes).square(), 1e-10)  # cdist goes over roots


def _pending(head: int, share: Share) -> object:
    from lte_ray.merging import Pending

    return Pending(head, 0, 0, 1, 1, 1.0, 0.0, share)


def krum_by_hand(changes: torch.Tensor, faulty: int, keep: int) -> list[int]:
    """Returns the heads that Krum keeps, from dense distances (Blanchard et al. 2017, section 4)."""
    k = len(changes)
    scores = []
    for i in range(k):
        distances = sorted(float((changes[i] - changes[j]).square().sum()) for j in range(k) if j != i)
        scores.append(sum(distances[: max(1, k - faulty - 2)]))
    return sorted(sorted(range(k), key=lambda i: scores[i])[:keep])


@given(st.integers(3, 7), st.integers(0, 99), st.integers(0, 2), st.integers(0, 3))
def test_krum_keeps_those_with_the_nearest_neighbours(heads: int, seed: int, faulty: int, keep: int) -> None:
    """By dense distances; those kept share the weight k/N, the others have weight 0."""
    pending = make_pending(heads, seed)
    weights = Krum(faulty=faulty, keep=keep).merge(pending, make_roster(8)).weights
    m = min(heads, keep or heads - faulty)
    kept = krum_by_hand(dense_changes(pending), faulty, m)
    assert weights == {h: heads / (8 * m) if h in kept else 0.0 for h in range(heads)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrimmedMean(trim=0.5), "--policy.trim is 0.5, but it must be at least 0 and below 0.5."),
        (lambda: Krum(faulty=-1), "--policy.faulty is -1, but it must be at least 0 and finite."),
        (lambda: Krum(keep=-1), "--policy.keep is -1, but it must be at least 0 and finite."),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], says: str) -> None:
    """The error names the flag, the value and the range."""
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value) == says


def test_parts_are_the_whole_cut_in_pieces() -> None:
    """Pending.part gives each entry of Pending.change, in its stored shape."""
    (pending,) = make_pending(1)
    parts = [pending.part(entry.name) for entry in PLAN.base.entries]
    assert [p.shape for p in parts] == [e.shape for e in PLAN.base.entries]
    assert_near(torch.cat([p.reshape(-1) for p in parts]), pending.change(), NEAR)
