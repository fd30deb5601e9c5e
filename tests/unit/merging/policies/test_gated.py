"""Loss-gated merging: a merge that makes the model worse leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.errors import ConfigError, PolicyError
from lte_ray.merging import ComposedPolicy, Discard, Gated, Try
from tests.support.numerics import assert_near
from tests.support.plans import make_contribution, random_flat
from tests.support.policies import PLAN, dense_change, make_coordinator, make_pending, make_roster


def contribute(coordinator: Coordinator, sequence: int) -> Tensor:
    """Lets the only head contribute, and returns the contribution."""
    sent = random_flat(PLAN.contribution.size, sequence)
    coordinator.receive(make_contribution(0, sequence), sent)
    return sent


def test_a_merge_that_raises_the_loss_is_discarded_with_the_figures() -> None:
    """The first is kept, so is the second with equal loss, not the third; the next is compared with the last one kept."""
    coordinator, _ = make_coordinator(ComposedPolicy(Gated()), heads=1)
    verdicts = []
    for sequence, loss in enumerate([2.0, 2.0, 2.5, 1.0], start=1):
        before = coordinator.base.clone()
        contribute(coordinator, sequence)
        assert torch.equal(coordinator.base, before)
        tried = coordinator.candidate
        assert tried is not None
        event_result = coordinator.receive_evaluation({"loss": loss, "accuracy": 0.0})
        verdicts += [v.accepted for v in event_result.results]
        assert torch.equal(coordinator.base, tried if verdicts[-1] else before)
        if not verdicts[-1]:
            assert event_result.results[0].reason == (
                "the policy discarded it: loss would have been 2.5 after 2, worse by more than 0"
            )
    assert verdicts == [True, True, False, True]
    assert coordinator.version == 3


def test_what_was_discarded_rides_in_the_next_contribution() -> None:
    """The reference remains that of the last merge kept, so the next merge includes the entire change since then."""
    coordinator, base = make_coordinator(ComposedPolicy(Gated()), heads=1)
    kept = contribute(coordinator, 1)
    coordinator.receive_evaluation({"loss": 1.0})
    contribute(coordinator, 2)
    coordinator.receive_evaluation({"loss": 3.0})
    last = contribute(coordinator, 3)
    coordinator.receive_evaluation({"loss": 1.0})
    first, second = make_pending(1, referenced=False)[0], make_pending(1)[0]
    first.share.contribution.copy_(kept)
    second.share.contribution.copy_(last)
    second.share.reference.copy_(kept[: PLAN.factors_size])  # type: ignore[union-attr]
    assert_near(coordinator.base, base + dense_change(first) + dense_change(second), 1e-13)  # two float64 products a layer


@pytest.mark.parametrize(
    ("gated", "values", "kept"),
    [
        (Gated(max_rise=0.5), [1.0, 1.5, 2.0, 2.6], [True, True, True, False]),
        (Gated(max_rise=0.5), [1.0, 1.6], [True, False]),
        (Gated(), [math.nan, math.inf, 5.0, 5.1], [False, False, True, False]),
        (Gated(metric="accuracy", higher_is_better=True), [0.5, 0.4, 0.6, 0.5], [True, False, True, False]),
        (Gated(metric="accuracy", higher_is_better=True, max_rise=0.1), [0.5, 0.41, 0.3], [True, True, False]),
    ],
)
def test_the_gate_is_max_rise_from_the_last_kept(gated: Gated, values: list[float], kept: list[bool]) -> None:
    """For the first metric or the named one; NaN and infinity are never kept."""
    found = []
    for value in values:
        decision = gated.merge(make_pending(1), make_roster(1))
        assert isinstance(decision, Try)
        judged = decision.judge({"loss": value, "accuracy": value})
        assert judged is decision.merge or isinstance(judged, Discard)
        found.append(judged is decision.merge)
    assert found == kept


@pytest.mark.parametrize("inner", ["nesterov", "adam"])
def test_the_inner_policys_memory_goes_back_with_the_merge(inner: str) -> None:
    """Momentum of a discarded merge is forgotten, whoever keeps it: the next merge is as if that merge had never happened."""
    bases = []
    for losses in ([1.0, 9.0, 0.5], [1.0, None, 0.5]):
        coordinator, _ = make_coordinator(ComposedPolicy(Gated(policy=inner, args=("lr=0.5",))), heads=1)
        for sequence, loss in enumerate(losses, start=1):
            if loss is not None:
                contribute(coordinator, sequence)
                assert coordinator.receive_evaluation({"loss": loss}).results[0].accepted == (loss < 9)
        bases.append(coordinator.base)
    assert torch.equal(*bases)


@pytest.mark.parametrize(
    ("gated", "values", "reason"),
    [
        (Gated(), [-3.0, -2.0], "loss would have been -2 after -3, worse by more than 0"),
        (Gated(max_rise=0.25), [1.0, math.inf], "loss would have been inf"),
        (Gated(), [math.nan], "loss would have been nan"),
        (Gated(higher_is_better=True), [3.0, 2.5], "loss would have been 2.5 after 3, worse by more than 0"),
    ],
)
def test_the_reason_has_the_figures(gated: Gated, values: list[float], reason: str) -> None:
    """They are those of the worker's evaluation."""
    for value in values:
        decision = gated.merge(make_pending(1), make_roster(1))
        assert isinstance(decision, Try)
        judged = decision.judge({"loss": value})
    assert judged == Discard([0], reason)


def test_the_gate_needs_its_metric() -> None:
    """A metric that the worker doesn't return is a PolicyError that lists those it returns."""
    coordinator, _ = make_coordinator(ComposedPolicy(Gated(metric="acuracy"), name="gated"), heads=1)
    contribute(coordinator, 1)
    with pytest.raises(PolicyError, match=r"policy gated raised .*--policy.metric is 'acuracy', but .* gave: loss, accuracy"):
        coordinator.receive_evaluation({"loss": 1.0, "accuracy": 0.5})


def decides_itself(pending: object, roster: object) -> None:
    """A function is a rule; this one isn't called."""


class Whole:
    """A policy that decides itself when to merge."""

    def decide(self, pending: object, roster: object) -> None:
        """Isn't called."""


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Gated(policy="nestrov"),
            r"^In --policy.policy and --policy.args of gated: --policy is 'nestrov', but .* Did you mean nesterov\?",
        ),
        (lambda: Gated(policy="gated"), "--policy.policy is 'gated', but gated needs a policy that merges and no more"),
        (lambda: Gated(policy=f"{__name__}:Whole"), "gated needs a policy that merges and no more"),
        (lambda: Gated(policy="nesterov", args=("lr",)), "--policy.args has 'lr', but each must be name=value"),
        (
            lambda: Gated(policy="nesterov", args=("momentun=1",)),
            r"of gated: The policy nesterov has no argument --policy.momentun. Did you mean momentum\?",
        ),
        (lambda: Gated(policy="stale", args=("discount=linear",)), "one of none, constant, polynomial"),
        (lambda: Gated(max_rise=-1.0), "--policy.max-rise is -1.0, but it must be at least 0 and finite."),
    ],
)
def test_a_wrong_inner_policy_is_a_config_error(make: Callable[[], object], says: str) -> None:
    """Before the run; it names the setting and the choices."""
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_function_can_be_gated() -> None:
    """In the user's own file."""
    assert Gated(policy=f"{__name__}:decides_itself").inner is not None
