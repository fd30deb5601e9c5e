"""Outer optimizers: the averaged change is the gradient, negated; torch.optim is the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lte_ray.errors import ConfigError
from lte_ray.merging import Adam, ComposedPolicy, DelayedNesterov, MergeChange, Momentum, Nesterov
from tests.support.numerics import assert_near
from tests.support.plans import random_flat
from tests.support.policies import PLAN, dense_changes, make_pending, make_roster

NEAR = 1e-13
"""Some ten float64 operations an element over a few merges."""

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
REFERENCES: list[tuple[object, Optimizer]] = [
    (Momentum(lr=0.3, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)),
    (Nesterov(), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
    (DelayedNesterov(), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
    (Adam(lr=0.01, eps=1e-4), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), eps=1e-4)),
]


@pytest.mark.parametrize(("policy", "make"), REFERENCES, ids=lambda x: type(x).__name__)
def test_an_outer_optimizer_steps_as_torchs(policy: object, make: Optimizer) -> None:
    """Over four merges of three heads, with the gradient -1/N sum D."""
    base = random_flat(PLAN.base.size, 1).requires_grad_()
    expected, found = make([base]), base.detach().clone()
    for turn in range(4):
        pending = make_pending(3, seed=turn)
        base.grad = -dense_changes(pending).sum(dim=0) / 3
        expected.step()
        found += policy.merge(pending, make_roster(3)).change  # type: ignore[attr-defined]
        assert_near(found, base, NEAR)


@pytest.mark.parametrize("heads", [1, 3])
def test_n_arrivals_of_delayed_nesterov_are_one_nesterov_merge(heads: int) -> None:
    """If no head trains on the versions in between: the sum of the N changes, in three cycles."""
    delayed, at_once = DelayedNesterov(), Nesterov()
    for turn in range(3):
        pending = make_pending(heads, seed=turn)
        changes = [delayed.merge([p], make_roster(heads)).change for p in pending]
        assert_near(torch.stack(changes).sum(dim=0), at_once.merge(pending, make_roster(heads)).change, NEAR)


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_delayed_nesterov_is_its_formula(delay: int) -> None:
    """W += lr D / N each; every K contributions m := beta m + their mean, W += lr beta m besides."""
    policy, buffer, count, m = DelayedNesterov(lr=0.5, momentum=0.8, delay=delay), 0.0, 0, 0.0
    for turn in range(11):
        pending = make_pending(1, seed=turn)
        change = dense_changes(pending)[0]
        buffer, count = buffer + change, count + 1
        expected = 0.5 * change / 3
        if count == delay:
            m, buffer, count = 0.8 * m + buffer / delay, 0.0, 0
            expected = expected + 0.5 * 0.8 * m
        assert_near(policy.merge(pending, make_roster(3)).change, expected, NEAR)


def test_momentum_counts_each_change_once_in_the_long_run() -> None:
    """With the defaults lr / (1 - beta) = 1: after one contribution and many of zeros, the base has moved by it."""
    policy, nothing = Momentum(), make_pending(1, referenced=False)
    nothing[0].share.contribution.zero_()
    first = make_pending(1, seed=1)
    moved = policy.merge(first, make_roster(1)).change.clone()
    for _ in range(400):
        moved += policy.merge(nothing, make_roster(1)).change
    assert_near(moved, dense_changes(first)[0], 1e-13)  # 0.9^400 is 5e-19; 400 sums


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_adam_with_its_defaults_averages_small_changes_and_bounds_big_ones(size: float) -> None:
    """The first merge moves each element by lr D / (|D| + eps): by D far below eps = lr, and by lr at most."""
    pending = make_pending(1, referenced=False)
    pending[0].share.contribution.mul_(size)
    found, change = Adam().merge(pending, make_roster(1)).change, dense_changes(pending)[0]
    assert_near(found * 1e3, change / (change.abs() + 1e-3), NEAR)


@pytest.mark.parametrize("policy", [Momentum(), Nesterov(), DelayedNesterov(), Adam()], ids=lambda p: type(p).__name__)
def test_a_change_isnt_touched_by_later_merges(policy: object) -> None:
    """The coordinator executes decisions later, so a returned change must not be modified."""
    first = policy.merge(make_pending(2), make_roster(2)).change  # type: ignore[attr-defined]
    kept = first.clone()
    policy.merge(make_pending(2, seed=1), make_roster(2))  # type: ignore[attr-defined]
    assert torch.equal(first, kept)


@pytest.mark.parametrize("policy", [Momentum, Nesterov, DelayedNesterov, Adam])
def test_state_before_the_first_merge_is_empty_and_loading_it_begins_anew(policy: type) -> None:
    """A run resumed at version 0 merges as a new one; the state passes through ComposedPolicy."""
    scheduled, pending = ComposedPolicy(policy()), make_pending(2)
    assert scheduled.state() == {}
    first = scheduled.decide(pending, make_roster(2))
    assert scheduled.state() != {}
    scheduled.load_state({})
    assert scheduled.state() == {}
    again = scheduled.decide(pending, make_roster(2))
    assert isinstance(first, MergeChange)
    assert isinstance(again, MergeChange)
    assert torch.equal(first.change, again.change)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Nesterov(momentum=1.0), "--policy.momentum is 1.0, but it must be at least 0 and below 1."),
        (lambda: Momentum(lr=0), "--policy.lr is 0, but it must be above 0 and finite."),
        (lambda: Momentum(lr=float("inf")), "--policy.lr is inf, but it must be above 0 and finite."),
        (lambda: DelayedNesterov(delay=-1), "--policy.delay is -1, but it must be at least 0 and finite."),
        (lambda: Adam(beta2=1.5), "--policy.beta2 is 1.5, but it must be at least 0 and below 1."),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], says: str) -> None:
    """The error names the flag, the value and the range."""
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value) == says
