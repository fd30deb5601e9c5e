"""What the coordinator doesn't merge: refused contributions, and decisions that can't be carried out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_ray.data.partition import initial_partitions
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.errors import PolicyError
from lte_ray.merging import Average, ComposedPolicy, Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Wait
from lte_ray.messages import Contribution, OuterStep, StepCoefficients
from tests.support.plans import make_contribution, plan_from_shapes, random_flat
from tests.support.tiny_worker import make_settings

PLAN = plan_from_shapes([(6, 5, 2)], [(4,)], scaling=2.0)
SIZE = PLAN.contribution.size


def make(policy: MergePolicy, **merge: Any) -> tuple[Coordinator, Tensor]:
    base, settings = random_flat(PLAN.base.size, 99), make_settings(heads=3)
    settings = dataclasses.replace(settings, merge=dataclasses.replace(settings.merge, **merge))
    return Coordinator(settings, PLAN, base.clone(), policy), base


def with_value(value: float, at: int = -1) -> Tensor:
    flat = random_flat(SIZE, 1)
    flat[at] = value
    return flat


def expected(shape: str, kind: str) -> str:
    """The refusal of this shape and type, as a pattern."""
    return re.escape(f"it has the shape {shape} and the type torch.{kind}, expected ({SIZE},) and torch.float64")


GOOD = random_flat(SIZE, 1)
REFUSED: dict[str, tuple[Contribution, Tensor, str]] = {
    "another run": (make_contribution(1, run="other"), GOOD, "it belongs to run 'other', not 'test'"),
    "unknown head": (make_contribution(3), GOOD, r"head 3 isn't one of the live heads \[0, 1, 2\]"),
    "negative head": (make_contribution(-1), GOOD, "head -1 isn't one of the live heads"),
    "repeat": (make_contribution(0), GOOD, "incarnation 0 sequence 1 of head 0 was received before, or is older"),
    "undecided": (make_contribution(0, 2), GOOD, "head 0 has a contribution that isn't decided yet"),
    "too new": (make_contribution(1, version=1), GOOD, "it was trained on version 1, but the newest is 0"),
    "sequence 0": (make_contribution(1, 0), GOOD, "its sequence is 0, but a head counts its contributions from 1"),
    "negative sequence": (make_contribution(1, -1, incarnation=1), GOOD, "its sequence is -1"),
    "too short": (make_contribution(1), GOOD[:-1], expected(f"({SIZE - 1},)", "float64")),
    "too long": (make_contribution(1), random_flat(SIZE + 1, 1), expected(f"({SIZE + 1},)", "float64")),
    "not flat": (make_contribution(1), GOOD.view(1, -1), expected(f"(1, {SIZE})", "float64")),
    "another type": (make_contribution(1), GOOD.float(), expected(f"({SIZE},)", "float32")),
    "NaN in a factor": (make_contribution(1), with_value(float("nan"), 0), "NaN, infinite or absurdly large"),
    "NaN in a replica": (make_contribution(1), with_value(float("nan")), "NaN, infinite or absurdly large"),
    "infinite": (make_contribution(1), with_value(float("-inf")), "NaN, infinite or absurdly large"),
    "absurdly large": (make_contribution(1), with_value(1e200), "NaN, infinite or absurdly large"),
}
HARMFUL = ("NaN in a factor", "NaN in a replica", "infinite", "absurdly large")
REJECTED = ("too short", "too long", "not flat", "another type", *HARMFUL)


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_bad_contribution_is_refused_and_nothing_else_is_touched(case: str) -> None:
    """The result has the reason; base, version and pending contributions stay, and the next good one is accepted.

    One that is rejected for its content uses up its number: its head sends another under the next.
    """
    contribution, buffer, reason = REFUSED[case]
    coordinator, base = make(ComposedPolicy(Average()))
    coordinator.receive(make_contribution(0), GOOD)
    event_result = coordinator.receive(contribution, buffer)
    (result,) = event_result.results
    assert (result.head, result.sequence, result.accepted) == (contribution.head, contribution.sequence, False)
    assert result.version == 0
    assert re.search(reason, result.reason)
    assert event_result.merges == ()
    assert torch.equal(coordinator.base, base)
    assert (coordinator.version, coordinator.pending_heads, coordinator.live) == (0, [0], {0, 1, 2})
    rejected = case in REJECTED
    assert result.harmful == (case in HARMFUL)
    if rejected:
        (again,) = coordinator.receive(make_contribution(1), GOOD).results
        assert "was received before" in again.reason
    coordinator.receive(make_contribution(1, 2 if rejected else 1), GOOD)
    assert coordinator.pending_heads == [0, 1]


def test_an_older_incarnation_is_refused_and_a_newer_one_counts_from_one() -> None:
    """After a restart the head's sequence begins at 1; late contributions of its predecessor are refused."""
    coordinator, base = make(Scripted(Discard([0], ""), Wait(), Discard([0], ""), Wait(), Wait()))
    assert coordinator.receive(make_contribution(0, 5), GOOD).results[0].reason.startswith("the policy discarded it")
    assert (
        coordinator.receive(make_contribution(0, 1, incarnation=1), GOOD)
        .results[0]
        .reason.startswith("the policy discarded it")
    )
    (result,) = coordinator.receive(make_contribution(0, 6), GOOD).results
    assert "is older" in result.reason
    assert torch.equal(coordinator.base, base)
    assert coordinator.receive(make_contribution(0, 2, incarnation=1), GOOD).results == ()
    assert coordinator.pending_heads == [0]


def test_the_third_rejected_contribution_in_a_row_quarantines_its_head() -> None:
    """It leaves the run, and its data are unassigned; a repeat doesn't count."""
    coordinator, base = make(Scripted(*[Wait()] * 9))
    bad = with_value(float("nan"))
    for sequence in (1, 2):
        assert not coordinator.receive(make_contribution(1, sequence), bad).results[0].quarantined
        assert not coordinator.receive(make_contribution(1, sequence), bad).results[0].quarantined  # a repeat
    (third,) = coordinator.receive(make_contribution(1, 3), bad).results
    assert (third.harmful, third.quarantined) == (True, True)
    assert coordinator.live == coordinator.members == {0, 2}
    assert coordinator.receive(make_contribution(1, 4), GOOD).results[0].reason == "head 1 isn't one of the live heads [0, 2]"
    assert torch.equal(coordinator.base, base)
    assert coordinator.assignor.unassigned == initial_partitions(1, 3)


@pytest.mark.parametrize("max_norm_z", [0.0, 100.0])
def test_a_merge_resets_the_count_of_rejected_contributions(max_norm_z: float) -> None:
    """Two bad ones, a merged one, two bad ones: the head stays, also where norms aren't compared."""
    coordinator, _ = make(Scripted(Merge({1: 0.1}), *[Wait()] * 9), max_norm_z=max_norm_z)
    for sequence in (1, 2, 4, 5):
        if sequence == 4:
            assert coordinator.receive(make_contribution(1, 3), GOOD).results[0].accepted
        (result,) = coordinator.receive(make_contribution(1, sequence), with_value(float("nan"))).results
        assert (result.harmful, result.quarantined) == (True, False)
    assert coordinator.live == {0, 1, 2}


def test_a_head_that_has_left_can_no_longer_contribute() -> None:
    """It is no longer live."""
    coordinator, _ = make(ComposedPolicy(Average()))
    coordinator.leave(1)
    (result,) = coordinator.receive(make_contribution(1), GOOD).results
    assert result.reason == "head 1 isn't one of the live heads [0, 2]"


class Scripted:
    """Returns these decisions in turn, or raises those that are exceptions."""

    def __init__(self, *decisions: Decision | Exception | object) -> None:
        self.decisions = list(decisions)

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        decision = self.decisions.pop(0)
        if isinstance(decision, Exception):
            raise decision
        return decision  # type: ignore[return-value]


ZERO = torch.zeros(PLAN.base.size, dtype=torch.float64)
IMPOSSIBLE: dict[str, tuple[Callable[[], object], str]] = {
    "raises": (lambda: KeyError("oops"), "Scripted raised KeyError: 'oops'"),
    "gives nothing": (lambda: None, "Scripted decided None; a decision is one of Wait, Merge, MergeChange, Discard and Try"),
    "gives weights only": (lambda: {0: 1.0}, "decided {0: 1.0}"),
    "merges no heads": (lambda: Merge({}), r"decided about heads \[\], but those with a contribution are \[0\]"),
    "merges unknown heads": (lambda: Merge({0: 1.0, 2: 1.0}), r"heads \[0, 2\], but those with a contribution are \[0\]"),
    "discards unknown heads": (lambda: Discard([1], "because"), r"heads \[1\], but those with a contribution are \[0\]"),
    "discards a head twice": (lambda: Discard([0, 0], "because"), r"heads \[0, 0\]"),
    "changes for no heads": (lambda: MergeChange(ZERO, []), r"heads \[\]"),
    "gives a NaN weight": (lambda: Merge({0: float("nan")}), "gave head 0 the weight nan; it must be a finite number"),
    "gives an infinite weight": (lambda: Merge({0: float("inf")}), "gave head 0 the weight inf; it must be a finite number"),
    "gives a short change": (
        lambda: MergeChange(ZERO[:-1], [0]),
        r"change of shape \(33,\); it must be finite and flat, \(34,\)",
    ),
    "gives a step of another kind": (
        lambda: Merge({0: 1.0}, {"lr": 0.5}),
        "gave a merge the step {'lr': 0.5}; it must be an Ou",
    ),  # type: ignore[arg-type]
    "gives half a step": (lambda: Merge({0: 1.0}, OuterStep(StepCoefficients(), None)), "it must be an OuterStep with"),  # type: ignore[arg-type]
    "gives a step with NaN": (
        lambda: Merge({0: 1.0}, OuterStep(StepCoefficients(), StepCoefficients(keep=float("nan")))),
        "gave a step whose keep is nan; it must be a finite number",
    ),
    "gives a change with NaN": (lambda: MergeChange(ZERO / 0, [0]), "must be finite"),
}


def refuse_decision(decision: object, reason: str) -> None:
    """The decision raises PolicyError for this reason, and the base stays as it was."""
    coordinator, base = make(Scripted(decision))
    with pytest.raises(PolicyError, match=reason):
        coordinator.receive(make_contribution(0), GOOD)
    assert torch.equal(coordinator.base, base)
    assert coordinator.version == 0


@pytest.mark.parametrize("case", list(IMPOSSIBLE))
def test_an_impossible_decision_is_a_policy_error(case: str) -> None:
    """The error names the policy and what is wrong; nothing is merged."""
    decision, reason = IMPOSSIBLE[case]
    refuse_decision(decision(), f"The merge policy .*{reason}" if "Scripted" not in reason else reason)


@pytest.mark.parametrize(
    "decision",
    [
        Merge({0: "half"}),  # type: ignore[dict-item]
        Merge({0: None}),  # type: ignore[dict-item]
        MergeChange(None, [0]),  # type: ignore[arg-type]
        MergeChange([0.0] * 34, [0]),  # type: ignore[arg-type]
        Discard(0, "because"),  # type: ignore[arg-type]
        Merge({"0": 1.0}),  # type: ignore[dict-item]
        Merge({0: 1.0, "1": 1.0}),  # type: ignore[dict-item]
    ],
    ids=["text as weight", "None as weight", "None as change", "list as change", "a number as heads", "text as head", "mixed"],
)
def test_a_decision_of_wrong_types_is_a_policy_error(decision: Decision) -> None:
    """A mistake inside a decision is a PolicyError, not a raw TypeError."""
    refuse_decision(decision, "The merge policy Scripted")


@pytest.mark.parametrize("last", ["arrives", "leaves"])
def test_waiting_forever_is_a_policy_error(last: str) -> None:
    """If every live head has contributed, a policy that still waits ends the run; the error says what it waits for."""
    coordinator, _ = make(Scripted(Wait(), Wait(), Wait("for the moon")))
    coordinator.receive(make_contribution(0), GOOD)
    coordinator.receive(make_contribution(1), GOOD)
    with pytest.raises(PolicyError, match=r"Scripted waits for the moon, but every live head .* the run could never go on"):
        coordinator.receive(make_contribution(2), GOOD) if last == "arrives" else coordinator.leave(2)


@pytest.mark.parametrize(("weight", "size", "scaling"), [(1e300, 1.0, 2.0), (1.0, 1e18, 1e3)], ids=["weight", "factors"])
def test_a_merge_never_makes_the_base_infinite(weight: float, size: float, scaling: float) -> None:
    """Finite weights or factors whose product overflows float32 aren't merged: a refusal or a PolicyError."""
    plan = plan_from_shapes([(6, 5, 2)], [(4,)], scaling=scaling)
    base = random_flat(plan.base.size, 99, torch.float32)
    coordinator = Coordinator(make_settings(heads=3), plan, base.clone(), Scripted(Merge({0: weight}), Wait()))
    try:
        event_result = coordinator.receive(make_contribution(0), torch.full((SIZE,), size))
    except PolicyError:
        pass
    else:
        assert [v.accepted for v in event_result.results] == [False]
    assert torch.equal(coordinator.base, base)
