"""Outer optimizers: the averaged change is the gradient, negated; torch.optim is the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_ray.errors import ConfigError
from lte_ray.merging import Adam, ComposedPolicy, DelayedNesterov, Merge, Momentum, Nesterov
from lte_ray.merging.registry import make_rule, saved_momentum
from tests.support.numerics import assert_near
from tests.support.plans import random_flat
from tests.support.policies import PLAN, Executor, dense_changes, make_pending, make_roster

NEAR = 1e-13
"""Some ten float64 operations an element over a few merges."""

FACTORS = PLAN.base.size - 5
"""Elements of the weights that have factors; the rest are replicas."""

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
REFERENCES: list[tuple[object, Optimizer]] = [
    (Momentum(lr=0.3, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)),
    (Nesterov(), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
    (DelayedNesterov(), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
    (Nesterov(lr=1.5, momentum=0.0), lambda p: torch.optim.SGD(p, lr=1.5)),
    (Adam(lr=0.01, eps=1e-4), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), eps=1e-4)),
]


def zeros() -> Executor:
    """Executes decisions on a base of zeros, which is then the total change."""
    return Executor(torch.zeros(PLAN.base.size, dtype=torch.float64))


@pytest.mark.parametrize(("policy", "make"), REFERENCES, ids=lambda x: type(x).__name__)
def test_an_outer_optimizer_steps_as_torchs(policy: Any, make: Optimizer) -> None:
    """Over four merges of three heads, with the gradient -1/N sum D."""
    base = random_flat(PLAN.base.size, 1).requires_grad_()
    expected, executor = make([base]), Executor(base.detach().clone())
    for turn in range(4):
        pending = make_pending(3, seed=turn)
        base.grad = -dense_changes(pending).sum(dim=0) / 3
        expected.step()
        assert_near(executor.execute(policy.merge(pending, make_roster(3)), pending), base, NEAR)


@pytest.mark.parametrize(
    ("policy", "nesterov"),
    [
        (Momentum(lr=0.3, momentum=0.8, replica_lr=0.2, replica_momentum=0.5), False),
        (Nesterov(lr=0.3, momentum=0.8, replica_lr=0.2, replica_momentum=0.5), True),
        (Nesterov(lr=0.3, momentum=0.0, replica_lr=0.2, replica_momentum=0.5), True),
        (Nesterov(lr=0.3, momentum=0.8, replica_momentum=0.0), True),
    ],
)
def test_replicas_have_rates_of_their_own(policy: Any, nesterov: bool) -> None:
    """The weights with factors and the replicas step as two parameter groups of torch.optim.SGD; None: the same rates."""
    parts = [part.clone().requires_grad_() for part in random_flat(PLAN.base.size, 1).split([FACTORS, 5])]
    rates = [
        (policy.lr, policy.momentum),
        (
            policy.lr if policy.replica_lr is None else policy.replica_lr,
            policy.momentum if policy.replica_momentum is None else policy.replica_momentum,
        ),
    ]
    optimizers = [
        torch.optim.SGD([part], lr=lr, momentum=beta, nesterov=nesterov and beta > 0)
        for part, (lr, beta) in zip(parts, rates, strict=True)
    ]
    executor = Executor(torch.cat([part.detach() for part in parts]))
    for turn in range(4):
        pending = make_pending(3, seed=turn)
        for part, optimizer, change in zip(
            parts, optimizers, dense_changes(pending).sum(dim=0).split([FACTORS, 5]), strict=True
        ):
            part.grad = -change / 3
            optimizer.step()
        assert_near(executor.execute(policy.merge(pending, make_roster(3)), pending), torch.cat(parts), NEAR)


@pytest.mark.parametrize("policy", [Momentum(lr=1.0, momentum=0.0), Nesterov(lr=1.0, momentum=0.0)])
def test_without_momentum_and_with_lr_1_it_is_the_average(policy: Any) -> None:
    """A merge by weights without a step, so bit for bit."""
    assert policy.merge(make_pending(2), make_roster(4)) == Merge({0: 0.25, 1: 0.25})


def test_a_gain_without_momentum_keeps_none() -> None:
    """No process needs another tensor as large as the base."""
    step = Nesterov(lr=2.0, momentum=0.0, replica_lr=1.5, final_lr=0.5).merge(make_pending(2), make_roster(2)).step
    assert step is not None
    assert not step.uses_momentum
    assert (step.factors.change, step.replicas.change) == (2.0, 1.5)


@pytest.mark.parametrize("kind", [Momentum, Nesterov, DelayedNesterov])
def test_the_learning_rate_decays_with_a_cosine(kind: type) -> None:
    """From lr to final_lr times it; replicas' too. The momentum itself doesn't depend on lr."""
    policy, pending = kind(lr=0.8, momentum=0.5, replica_lr=0.4, final_lr=0.25), make_pending(2)
    for progress in (0.0, 0.3, 1.0):
        factor = 0.25 + 0.75 * (1 + math.cos(math.pi * progress)) / 2
        step = policy.merge(pending, make_roster(2, progress=progress)).step
        full = kind(lr=0.8, momentum=0.5, replica_lr=0.4).merge(pending, make_roster(2, progress=progress)).step
        for part, whole in ((step.factors, full.factors), (step.replicas, full.replicas)):
            assert (part.keep, part.add) == (whole.keep, whole.add)
            assert part.change == pytest.approx(factor * whole.change)
            assert part.momentum == pytest.approx(factor * whole.momentum)


@pytest.mark.parametrize("kind", [Momentum, Nesterov])
def test_momentum_grows_over_the_first_merges(kind: type) -> None:
    """beta_v = beta min(1, v / warmup); the first changes are part of m, though beta is 0 then."""
    policy, executor, m, expected = kind(lr=0.5, momentum=0.8, warmup=4), zeros(), 0.0, 0.0
    for version in range(6):
        beta, pending = 0.8 * min(1, version / 4), make_pending(1, seed=version)
        change = dense_changes(pending)[0]
        m = beta * m + change
        expected = expected + 0.5 * (m if kind is Momentum else change + beta * m)
        executor.execute(policy.merge(pending, make_roster(1, version=version)), pending)
        assert_near(executor.base, expected, NEAR)


@pytest.mark.parametrize("heads", [1, 3])
def test_n_arrivals_of_delayed_nesterov_are_one_nesterov_merge(heads: int) -> None:
    """If no head trains on the versions in between: the sum of the N changes, in three cycles."""
    delayed, at_once, one, other = DelayedNesterov(), Nesterov(), zeros(), zeros()
    for turn in range(3):
        pending = make_pending(heads, seed=turn)
        for p in pending:
            one.execute(delayed.merge([p], make_roster(heads)), [p])
        other.execute(at_once.merge(pending, make_roster(heads)), pending)
        assert_near(one.base, other.base, NEAR)


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_delayed_nesterov_is_its_formula(delay: int) -> None:
    """W += lr D / N each; every K contributions m := beta m + their mean, W += lr beta m besides."""
    policy, buffer, count, m = DelayedNesterov(lr=0.5, momentum=0.8, delay=delay), 0.0, 0, 0.0
    executor, expected = zeros(), 0.0
    for turn in range(11):
        pending = make_pending(1, seed=turn)
        change = dense_changes(pending)[0]
        buffer, count = buffer + change, count + 1
        expected = expected + 0.5 * change / 3
        if count == delay:
            m, buffer, count = 0.8 * m + buffer / delay, 0.0, 0
            expected = expected + 0.5 * 0.8 * m
        assert_near(executor.execute(policy.merge(pending, make_roster(3)), pending), expected, NEAR)


@pytest.mark.parametrize("policy", [Momentum(), Nesterov(lr=0.3, momentum=0.7), DelayedNesterov(lr=0.3, momentum=0.7)])
def test_each_change_counts_lr_by_1_minus_beta_times_in_the_long_run(policy: Any) -> None:
    """After one contribution and many of zeros, the base has moved by that; with Momentum's defaults, once."""
    nothing, first, executor = make_pending(1, referenced=False), make_pending(1, seed=1), zeros()
    nothing[0].share.contribution.zero_()
    for pending in [first, *[nothing] * 400]:
        executor.execute(policy.merge(pending, make_roster(1)), pending)
    gain = policy.lr / (1 - policy.momentum)
    assert_near(executor.base, gain * dense_changes(first)[0], 1e-13)  # 0.9^400 is 5e-19; 400 sums


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_adam_with_its_defaults_averages_small_changes_and_bounds_big_ones(size: float) -> None:
    """The first merge moves each element by lr D / (|D| + eps): by D far below eps = lr, and by lr at most."""
    pending = make_pending(1, referenced=False)
    pending[0].share.contribution.mul_(size)
    found, change = Adam().merge(pending, make_roster(1)).change, dense_changes(pending)[0]
    assert_near(found * 1e3, change / (change.abs() + 1e-3), NEAR)


def test_adams_change_isnt_touched_by_later_merges() -> None:
    """The coordinator executes decisions later, so a returned change must not be modified."""
    policy = Adam()
    first = policy.merge(make_pending(2), make_roster(2)).change
    kept = first.clone()
    policy.merge(make_pending(2, seed=1), make_roster(2))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("policy", [Momentum(), Nesterov(warmup=3, final_lr=0.5)])
def test_the_momentum_isnt_the_policys_state(policy: Any) -> None:
    """It decides by the roster alone, so there is nothing to save."""
    first, again = (policy.merge(make_pending(2), make_roster(2)) for _ in range(2))
    assert first == again
    assert ComposedPolicy(policy).state() == {}


def test_delayed_nesterov_remembers_how_many_contributions_there_were() -> None:
    """A run resumed in mid-cycle continues it; the state passes through ComposedPolicy."""
    decisions = []
    policy = ComposedPolicy(DelayedNesterov(delay=3))
    for _ in range(4):
        decisions.append(policy.decide(make_pending(1), make_roster(1)))
        state, policy = policy.state(), ComposedPolicy(DelayedNesterov(delay=3))
        policy.load_state(state)
    whole = DelayedNesterov(delay=3)
    assert decisions == [whole.merge(make_pending(1), make_roster(1)) for _ in range(4)]


def test_adam_begins_anew_without_state() -> None:
    """A run resumed at version 0 merges as a new one; the state passes through ComposedPolicy."""
    scheduled, pending = ComposedPolicy(Adam()), make_pending(2)
    assert scheduled.state() == {}
    first: Any = scheduled.decide(pending, make_roster(2))
    assert scheduled.state() != {}
    scheduled.load_state({})
    assert scheduled.state() == {}
    again: Any = scheduled.decide(pending, make_roster(2))
    assert torch.equal(first.change, again.change)


SAVED = {"momentum": torch.tensor([1.0, 2.0]), "sum": torch.tensor([4.0, 8.0]), "count": torch.tensor(2)}
"""What an earlier release saved of DelayedNesterov in mid-cycle: m, the sum of 1/N D of this cycle, and its contributions."""


@pytest.mark.parametrize(
    ("policy", "arguments", "saved", "expected"),
    [
        ("nesterov", {}, {"momentum": SAVED["momentum"]}, [1.0, 2.0]),
        ("momentum", {}, {"momentum": SAVED["momentum"]}, [1.0, 2.0]),
        ("delayed_nesterov", {"momentum": 0.5}, SAVED, [4.5, 9.0]),  # beta m + N / K sum, with K = N
        ("delayed_nesterov", {"momentum": 0.5, "delay": 6}, SAVED, [2.5, 5.0]),  # and with K = 2 N
        ("delayed_nesterov", {}, {**SAVED, "sum": torch.zeros(2), "count": torch.tensor(0)}, [1.0, 2.0]),
        ("delayed_nesterov", {"delay": 3}, {"sum": SAVED["sum"], "count": torch.tensor(1)}, [4.0, 8.0]),
        ("gated", {"policy": "nesterov"}, {"inner.momentum": SAVED["momentum"], "kept": torch.tensor(1.0)}, [1.0, 2.0]),
        ("nesterov", {}, {}, None),
        ("adam", {}, {"momentum": SAVED["momentum"]}, None),
    ],
)
def test_the_momentum_in_the_state_of_an_earlier_release(
    policy: str, arguments: dict[str, Any], saved: dict[str, Tensor], expected: list[float] | None
) -> None:
    """It becomes that of the outer steps, of three heads; other policies have none."""
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    momentum = saved_momentum(ComposedPolicy(make_rule(policy, arguments)), saved, 3)
    assert (None if momentum is None else momentum.tolist()) == expected
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Nesterov(momentum=1.0), "--policy.momentum is 1.0, but it must be at least 0 and below 1."),
        (lambda: Nesterov(replica_momentum=-0.1), "--policy.replica-momentum is -0.1, but it must be at least 0 and below 1."),
        (lambda: Momentum(lr=0), "--policy.lr is 0, but it must be above 0 and finite."),
        (lambda: Momentum(lr=float("inf")), "--policy.lr is inf, but it must be above 0 and finite."),
        (lambda: Momentum(replica_lr=0.0), "--policy.replica-lr is 0.0, but it must be above 0 and finite."),
        (lambda: Momentum(final_lr=0.0), "--policy.final-lr is 0.0, but it must be above 0 and at most 1."),
        (lambda: Momentum(warmup=-1), "--policy.warmup is -1, but it must be at least 0 and finite."),
        (lambda: DelayedNesterov(delay=-1), "--policy.delay is -1, but it must be at least 0 and finite."),
        (lambda: Adam(beta2=1.5), "--policy.beta2 is 1.5, but it must be at least 0 and below 1."),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], says: str) -> None:
    """The error names the flag, the value and the range."""
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value) == says
