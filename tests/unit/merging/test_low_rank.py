"""The arithmetic of merging, compared with dense float64 sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.layout import Adapted, Layout, Plan
from lte_ray.merging.flat_buffer import base_replicas, factor_views, factors_part, gather, replica_part, replica_views, views
from lte_ray.merging.low_rank import Share, add_contributions, add_products, dense_change, fold_reference, new_reference
from tests.support.dense_reference import dense_change_by_formula, split_flat
from tests.support.numerics import assert_near
from tests.support.plans import plan_from_shapes, random_flat

sizes = st.integers(1, 6)
plans = st.builds(
    plan_from_shapes,
    st.lists(st.tuples(sizes, sizes, st.integers(1, 3)), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(1, 4), max_size=2).map(tuple), max_size=2),
    st.sampled_from([0.25, 1.0, 2.0]),
)
shares = st.lists(st.tuples(st.floats(-1, 1), st.booleans()), min_size=1, max_size=4)


def make_shares(plan: Plan, kinds: list[tuple[float, bool]]) -> list[Share]:
    made = []
    for i, (weight, has_reference) in enumerate(kinds):
        reference = random_flat(plan.factors_size, 100 + i) if has_reference else None
        made.append(Share(weight, plan, random_flat(plan.contribution.size, i), reference))
    return made


@given(plans, shares)
def test_a_merge_is_the_weighted_sum_of_dense_changes(plan: Plan, kinds: list[tuple[float, bool]]) -> None:
    """base += sum_n w_n [s (B_n A_n - B'_n A'_n), p_n - p'_n], for any heads, ranks, weights and references."""
    before = random_flat(plan.base.size, 7)
    base = before.clone()
    made = make_shares(plan, kinds)
    add_contributions(base, made)
    expected = before + sum(s.weight * dense_change_by_formula(plan, s.contribution, s.reference) for s in made)
    assert_near(base, expected, 1e-13)  # sums of at most 4 x 2 x 3 float64 products


@given(plans, st.booleans())
def test_dense_change_is_the_unweighted_change(plan: Plan, has_reference: bool) -> None:
    """It is the change with weight 1 as a new tensor; the contribution isn't modified."""
    (share,) = make_shares(plan, [(1.0, has_reference)])
    kept = share.contribution.clone()
    change = dense_change(share)
    assert change.shape == (plan.base.size,)
    assert_near(change, dense_change_by_formula(plan, share.contribution, share.reference), 1e-13)  # as above
    assert torch.equal(share.contribution, kept)


@given(plans, st.integers(1, 5))
def test_single_merges_equal_one_merge_of_all(plan: Plan, heads: int) -> None:
    """N merges of one head with weight 1/N equal one merge of all N."""
    made = make_shares(plan, [(1 / heads, n % 2 == 0) for n in range(heads)])
    together = random_flat(plan.base.size, 7)
    apart = together.clone()
    add_contributions(together, made)
    for share in made:
        add_contributions(apart, [share])
    assert_near(apart, together, 1e-13)  # the same float64 terms in another grouping


def test_products_are_averaged_not_factors() -> None:
    """The merge is mean(B A), which differs from mean(B) mean(A) by the cross terms."""
    plan = plan_from_shapes([(6, 5, 2)], [])
    contributions = [random_flat(plan.contribution.size, n) for n in range(3)]
    base = torch.zeros(plan.base.size, dtype=torch.float64)
    add_contributions(base, [Share(1 / 3, plan, c, None) for c in contributions])
    pairs = [split_flat(c, [(2, 5), (6, 2)]) for c in contributions]
    averaged = sum(b @ a for a, b in pairs) / 3
    wrong = (sum(b for _, b in pairs) / 3) @ (sum(a for a, _ in pairs) / 3)
    assert_near(base.view(6, 5), averaged, 1e-14)  # three float64 products of inner size 2
    assert torch.linalg.matrix_norm(wrong - averaged) > 0.5 * torch.linalg.matrix_norm(averaged)


def test_a_merge_of_the_reference_itself_changes_no_weight() -> None:
    """A head that hasn't changed since its reference adds nothing to the main weights."""
    plan = plan_from_shapes([(6, 5, 2), (3, 4, 1)], [(3,)])
    contribution = random_flat(plan.contribution.size, 1)
    replica_part(plan, contribution).zero_()
    base = random_flat(plan.base.size, 2)
    before = base.clone()
    add_contributions(base, [Share(0.5, plan, contribution, factors_part(plan, contribution).clone())])
    assert_near(base, before, 1e-15)  # equal terms of both signs cancel to rounding


def test_the_same_shares_give_the_same_bits() -> None:
    """The same shares in the same order give the same bits."""
    plan = plan_from_shapes([(6, 5, 2)], [(4,)])
    made = make_shares(plan, [(0.3, True), (0.7, False)])
    first, second = torch.zeros(2, plan.base.size, dtype=torch.float64)
    add_contributions(first, made)
    add_contributions(second, made)
    assert torch.equal(first, second)


def test_folding_takes_a_reference_out_of_a_weight() -> None:
    """W~ = W - s B' A', into a weight of any type; adding the product again gives W."""
    weight, b, a = random_flat(12, 1).view(3, 4), random_flat(6, 2).view(3, 2), random_flat(8, 3).view(2, 4)
    spec = Adapted("w", (3, 4), 2, 1.5)
    folded = torch.empty_like(weight)
    fold_reference(spec, folded, weight, b, a)
    assert_near(folded, weight - 1.5 * b @ a, 1e-15)  # two float64 products a sum
    rounded = torch.empty_like(weight, dtype=torch.bfloat16)
    fold_reference(spec, rounded, weight, b, a)
    assert torch.equal(rounded, folded.bfloat16())  # rounded once, at the end
    add_products(folded, [(1.5, b, a)])
    assert_near(folded, weight, 1e-15)


def test_adding_no_products_is_nothing() -> None:
    """Without terms the weight keeps its bits."""
    weight = random_flat(12, 1).view(3, 4)
    before = weight.clone()
    add_products(weight, [])
    assert torch.equal(weight, before)


def test_the_new_reference_is_the_contributed_factors_or_none_after_a_reset() -> None:
    """Reset-less: a copy of the factors. reset="B": none, as B' = 0."""
    plan = plan_from_shapes([(6, 5, 2)], [(4,)])
    contribution = random_flat(plan.contribution.size, 1)
    reference = new_reference(Share(1.0, plan, contribution, None), "none")
    assert reference is not None
    assert torch.equal(reference, contribution[: plan.factors_size])
    contribution.zero_()
    assert reference.any()
    assert new_reference(Share(1.0, plan, contribution, None), "B") is None


def test_layouts_hold_weights_first_and_replicas_last() -> None:
    """base: weights, replicas. contribution: A and B of each weight, then replica changes, without gaps."""
    plan = plan_from_shapes([(6, 5, 2), (3, 4, 1)], [(4,), ()])
    assert [(e.name, e.shape, e.offset) for e in plan.base.entries] == [
        ("w0", (6, 5), 0),
        ("w1", (3, 4), 30),
        ("p0", (4,), 42),
        ("p1", (), 46),
    ]
    assert [(e.name, e.shape, e.offset) for e in plan.contribution.entries] == [
        ("w0.lora_A", (2, 5), 0),
        ("w0.lora_B", (6, 2), 10),
        ("w1.lora_A", (1, 4), 22),
        ("w1.lora_B", (3, 1), 26),
        ("p0", (4,), 29),
        ("p1", (), 33),
    ]
    assert (plan.base.size, plan.contribution.size, plan.factors_size) == (47, 34, 29)


def test_views_share_memory_and_refuse_another_size() -> None:
    """Writing to a view writes to the buffer; a buffer of another size is refused."""
    layout = Layout.from_shapes([("a", (2, 2)), ("b", (3,))])
    flat = torch.zeros(7)
    views(layout, flat)["b"].fill_(1.0)
    assert flat.tolist() == [0, 0, 0, 0, 1, 1, 1]
    for size in (6, 8):
        with pytest.raises(ValueError, match=r"expected a flat buffer of 7 elements"):
            views(layout, torch.zeros(size))


def test_parts_of_buffers_are_where_the_layouts_say() -> None:
    """Factors and replicas sliced from flat buffers equal the views of the complete layouts."""
    plan = plan_from_shapes([(6, 5, 2), (3, 4, 1)], [(4,), (2, 2)])
    base, contribution = random_flat(plan.base.size, 1), random_flat(plan.contribution.size, 2)
    whole = views(plan.contribution, contribution)
    parts = factor_views(plan, factors_part(plan, contribution)) | replica_views(plan, replica_part(plan, contribution))
    assert list(parts) == list(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    held = replica_views(plan, base_replicas(plan, base))
    assert all(torch.equal(held[name], views(plan.base, base)[name]) for name in held)
    assert torch.equal(gather(plan.base, views(plan.base, base), torch.float64), base)
