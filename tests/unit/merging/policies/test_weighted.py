"""Policies that return weights: by samples, staleness and norm. The weights stay normalized."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.errors import ConfigError
from lte_ray.merging import Clip, Samples, Stale
from lte_ray.merging.policies.weighted import RollingWeights
from tests.support.policies import dense_change, make_pending, make_roster

AMOUNTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)
ROUNDING = 1e-13
"""Sums of a few dozen float64 numbers, and one division each."""


def arrivals(window: RollingWeights, amounts: list[float], num_heads: int) -> list[float]:
    """Returns the weights of contributions that are merged one by one."""
    return [window.weights({0: amount}, num_heads)[0] for amount in amounts]


@given(AMOUNTS)
def test_all_heads_in_one_merge_weigh_one_together(amounts: list[float]) -> None:
    """w_i = a_i / sum a, whatever was merged before."""
    window = RollingWeights()
    arrivals(window, [7.0, 0.1], len(amounts))
    weights = window.weights(dict(enumerate(amounts)), len(amounts))
    assert list(weights.values()) == pytest.approx([a / sum(amounts) for a in amounts], rel=ROUNDING)


@given(AMOUNTS, st.randoms(use_true_random=False))
def test_a_cycle_of_single_arrivals_weighs_one(amounts: list[float], chance: random.Random) -> None:
    """Once N contributions are known, amounts that repeat every cycle have weights with the sum 1, as with the average."""
    window, num_heads = RollingWeights(), len(amounts)
    chance.shuffle(amounts)
    arrivals(window, amounts, num_heads)
    for _ in range(3):
        assert sum(arrivals(window, amounts, num_heads)) == pytest.approx(1, rel=ROUNDING)


@given(AMOUNTS, st.data())
def test_any_n_consecutive_contributions_weigh_one_in_one_merge(amounts: list[float], data: st.DataObject) -> None:
    """The invariant itself: a weight is the amount divided by the sum of the last N amounts, in whatever merges they were."""
    window, num_heads, seen = RollingWeights(), data.draw(st.integers(1, 4)), [1.0]
    arrivals(window, seen * num_heads, num_heads)
    seen = seen * num_heads
    while amounts:
        size = data.draw(st.integers(1, min(num_heads, len(amounts))))
        batch, amounts = amounts[:size], amounts[size:]
        seen += batch
        weights = window.weights(dict(enumerate(batch)), num_heads)
        expected = [a / math.fsum(seen[-num_heads:]) for a in batch]
        assert list(weights.values()) == pytest.approx(expected, rel=ROUNDING)
        assert sum(weights.values()) <= 1 + ROUNDING


@pytest.mark.parametrize("amounts", [(1.0, 0.3, 0.2), (5.0, 1.0, 1.0, 0.5)])
def test_amounts_in_random_order_weigh_one_each_cycle_in_expectation(amounts: tuple[float, ...]) -> None:
    """Over all orders of the last N amounts, the mean weight of the newest is exactly 1/N."""
    newest = [arrivals(RollingWeights(), list(order), len(amounts))[-1] for order in itertools.permutations(amounts)]
    assert sum(newest) / len(newest) == pytest.approx(1 / len(amounts), rel=ROUNDING)


@given(st.integers(1, 6), st.floats(0.01, 10.0), st.integers(1, 20))
def test_equal_amounts_are_the_average(num_heads: int, amount: float, contributions: int) -> None:
    """w = 1/N from the first contribution on."""
    assert arrivals(RollingWeights(), [amount] * contributions, num_heads) == pytest.approx(
        [1 / num_heads] * contributions, rel=ROUNDING
    )


def test_nothing_at_all_is_the_average() -> None:
    """Amounts of only 0 (no samples) don't divide by zero."""
    assert RollingWeights().weights({0: 0.0, 1: 0.0}, 4) == {0: 0.25, 1: 0.25}


def test_samples_weigh_in_proportion() -> None:
    """FedAvg's n_i / n if all heads merge together."""
    merge = Samples().merge(make_pending(3, samples=[10, 20, 70]), make_roster(3))
    assert merge.weights == pytest.approx({0: 0.1, 1: 0.2, 2: 0.7})


@pytest.mark.parametrize(
    ("stale", "discounts"),
    [
        (Stale(discount="none"), [1, 1, 1]),
        (Stale(discount="constant", factor=0.25), [1, 0.25, 0.25]),
        (Stale(discount="polynomial", power=0.5), [1, 2**-0.5, 0.5]),
        (Stale(discount="polynomial", power=1.0, fresh=1), [1, 1, 1 / 3]),
        (Stale(discount="constant", factor=0.25, fresh=1), [1, 1, 0.25]),
    ],
)
def test_discounts_are_the_formulas(stale: Stale, discounts: list[float]) -> None:
    """For lags 0, 1 and 3; normalized over one merge of all."""
    merge = stale.merge(make_pending(3, lags=[0, 1, 3]), make_roster(3))
    assert list(merge.weights.values()) == pytest.approx([d / sum(discounts) for d in discounts])


@given(st.sampled_from(["none", "constant", "polynomial"]), st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_equally_stale_contributions_are_the_average(discount: str, heads: int, lag: int, at_once: bool) -> None:
    """An equal discount for all changes nothing, at once or one by one: the weights stay normalized."""
    stale, pending = Stale(discount=discount), make_pending(heads, lags=[lag] * heads)  # type: ignore[arg-type]
    merges = [pending] if at_once else [[p] for p in pending]
    weights = {h: w for batch in merges for h, w in stale.merge(batch, make_roster(heads)).weights.items()}
    assert weights == pytest.approx(dict.fromkeys(range(heads), 1 / heads), rel=ROUNDING)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=5), st.sampled_from(["constant", "polynomial"]))
def test_a_cycle_with_the_same_lags_weighs_as_much_as_the_averages(lags: list[int], discount: str) -> None:
    """One by one, in steady state: late heads get less, fresh ones more, together 1."""
    stale, heads = Stale(discount=discount), len(lags)  # type: ignore[arg-type]
    pending, weights = make_pending(heads, lags=lags), {}
    for _ in range(2):
        weights = {p.head: stale.merge([p], make_roster(heads)).weights[p.head] for p in pending}
    assert sum(weights.values()) == pytest.approx(1, rel=ROUNDING)
    ordered = sorted(range(heads), key=lambda h: lags[h])
    assert all(weights[a] >= weights[b] * (1 - ROUNDING) for a, b in itertools.pairwise(ordered))


def test_stale_may_count_samples_too() -> None:
    """d_i n_i, normalized."""
    merge = Stale(power=1.0, by_samples=True).merge(make_pending(2, lags=[0, 1], samples=[10, 60]), make_roster(2))
    assert merge.weights == pytest.approx({0: 0.25, 1: 0.75})


def test_clip_bounds_the_norm_by_a_number() -> None:
    """w |D| is at most max_norm / N, and shorter contributions keep 1/N."""
    pending = make_pending(3)
    norms = [float(dense_change(p).norm()) for p in pending]
    most = sorted(norms)[1]
    weights = Clip(max_norm=most).merge(pending, make_roster(4)).weights
    assert [weights[h] * 4 * norms[h] for h in range(3)] == pytest.approx([min(n, most) for n in norms])


def test_clip_bounds_the_norm_by_the_others() -> None:
    """Without a number, `times` the median norm of the last N contributions, including earlier ones."""
    clip, pending = Clip(times=1.5), make_pending(3)
    norms = [float(dense_change(p).norm()) for p in pending]
    for p in pending[:2]:
        clip.merge([p], make_roster(3))
    huge = make_pending(1, seed=5)[0]
    huge.share.contribution.mul_(100)
    weight = clip.merge([huge], make_roster(3)).weights[0]
    median = sorted([*norms[:2], float(dense_change(huge).norm())])[1]
    assert weight * 3 * float(dense_change(huge).norm()) == pytest.approx(1.5 * median)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Stale(discount="linear"), "--policy.discount is 'linear', but it must be one of: none, constant, polynomial."),
        (lambda: Stale(power=-1), "--policy.power is -1, but it must be at least 0 and finite."),
        (lambda: Stale(power=math.nan), "--policy.power is nan, but it must be at least 0 and finite."),
        (lambda: Stale(factor=0), "--policy.factor is 0, but it must be above 0 and at most 1."),
        (lambda: Stale(fresh=-1), "--policy.fresh is -1, but it must be at least 0 and finite."),
        (lambda: Clip(times=0), "--policy.times is 0, but it must be above 0 and finite."),
        (lambda: Clip(max_norm=math.inf), "--policy.max-norm is inf, but it must be at least 0 and finite."),
    ],
)
def test_arguments_out_of_range_are_refused(make: object, says: str) -> None:
    """The error names the flag, the value and the range."""
    with pytest.raises(ConfigError) as raised:
        make()  # type: ignore[operator]
    assert str(raised.value) == says
