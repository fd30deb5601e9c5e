"""The conformance kit detects faults of policies and describes them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lte_ray.errors import ConfigError, PolicyError
from lte_ray.merging import Average, ComposedPolicy, Decision, Merge, MergeChange, Pending, Roster, Try, Wait, combine
from lte_ray.testing import check_policy
from tests.support.plans import make_contribution, random_flat
from tests.support.policies import PLAN, make_coordinator


class Raises:
    """Raises at the second merge."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        if roster.version:
            raise KeyError("oops")
        return Average().merge(pending, roster)


class NaNWeights:
    """Divides by zero."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
        return {p.head: float("nan") for p in pending}


class HugeWeights:
    """Weights that sum to anything."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
        return {p.head: 1e9 for p in pending}


class NaNChange:
    """A change that isn't finite."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Tensor:
        return combine(pending, {p.head: 1.0 for p in pending}) * float("inf")


class WrongShape:
    """Returns a change of the wrong layout."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Tensor:
        return torch.ones(3)


class Nothing:
    """Returns no decision."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> None:
        return None


class NeverDecides:
    """Waits for something that can't happen."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Wait("for the moon")


class PutsOff:
    """Waits for a time, repeatedly."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Wait("a little longer", until=roster.now + 1.0)


class Hurries:
    """Waits for a time in the past."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Wait("for yesterday", until=roster.now - 1.0)


class ForgetsThoseWhoLeft:
    """Decides about live heads only."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        live = {p.head: 0.5 for p in pending if p.head in roster.live}
        return Merge(live) if live and len(pending) == len(roster.live) else Wait("for the living")


class Mutates:
    """Scales a contribution in place."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        pending[0].share.contribution.mul_(0.5)
        return Average().merge(pending, roster)


class Sorts:
    """Reorders the list of its argument."""

    def decide(self, pending: list[Pending], roster: Roster) -> Decision:
        ready = len(pending) >= len(roster.live) and pending
        pending.reverse()
        return Merge({p.head: 1.0 for p in pending}) if ready else Wait()


class Chance:
    """Draws from an unseeded generator."""

    drawn = random.Random(0)

    def merge(self, pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
        return {p.head: self.drawn.random() for p in pending}


class Forgetful:
    """Has state that a checkpoint doesn't include."""

    def __init__(self) -> None:
        self.merges = 0

    def merge(self, pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
        self.merges += 1
        return {p.head: 1 / (self.merges + roster.num_heads) for p in pending}


class Remembering(Forgetful):
    """Saves its state."""

    def state(self) -> dict[str, Tensor]:
        return {"merges": torch.tensor(self.merges)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.merges = int(tensors["merges"])


class LoadsNothing(Remembering):
    """Saves its state, but doesn't restore it."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        pass


class Writes:
    """Modifies, after its decision, the tensor that it returned."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def merge(self, pending: Sequence[Pending], roster: Roster) -> MergeChange:
        self.total = combine(pending, {p.head: 1.0 for p in pending}, out=self.total)
        return MergeChange(self.total, [p.head for p in pending])


class OtherJudge:
    """Decides about something other than what it tried."""

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Try:
        weights = {p.head: 0.5 for p in pending}
        return Try(Merge(weights), lambda values: Merge(weights))


FAULTS: list[tuple[type, str]] = [
    (Raises, "The merge policy Raises raised KeyError: 'oops'"),
    (NaNWeights, "The merge policy NaNWeights gave head 0 the weight nan; it must be a finite number"),
    (
        HugeWeights,
        r"The merge policy HugeWeights gave head 0 the weight 1000000000\.0; it must be a finite number below 1e\+06",
    ),
    (NaNChange, "The merge policy NaNChange gave a change that holds NaN or infinity"),
    (WrongShape, r"The merge policy WrongShape gave a change of shape \(3,\)"),
    (Nothing, "The merge policy Nothing decided None; a decision is one of"),
    (NeverDecides, "The merge policy NeverDecides waits for the moon, but every live head .* the run could never go on"),
    (OtherJudge, "The merge policy OtherJudge judged Merge"),
]


@pytest.mark.parametrize(("policy", "says"), FAULTS, ids=[kind.__name__ for kind, _ in FAULTS])
def test_a_misbehaving_policy_ends_the_run_with_an_error_that_names_it(policy: type, says: str) -> None:
    """PolicyError in the engine, whatever the policy does; the base stays as it was."""
    made = policy()
    scheduled = made if hasattr(made, "decide") else ComposedPolicy(made)
    coordinator, base = make_coordinator(scheduled, heads=1)
    with pytest.raises(PolicyError, match=says):  # noqa: PT012 - Raises does so at its second merge, OtherJudge later
        for sequence in (1, 2):
            base = coordinator.base.clone()
            coordinator.receive(make_contribution(0, sequence), random_flat(PLAN.contribution.size, sequence))
            if coordinator.candidate is not None:
                coordinator.receive_evaluation({"loss": 1.0})
    assert torch.equal(coordinator.base, base)


def names_a_stranger(pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
    return {99: 1.0}


KIT_FAULTS = [
    *FAULTS,
    (PutsOff, "waits a little longer, but every live head"),
    (Hurries, "waits for yesterday, but every live head"),
    (ForgetsThoseWhoLeft, "The merge policy ForgetsThoseWhoLeft waits for the living, but every live head"),
    (Mutates, "it changed the tensors of head 0's contribution, which it may only read"),
    (Sorts, "it changed the list of pending contributions"),
    (Chance, "the same events led to different decisions: first «.*», then «.*»"),
    (
        Forgetful,
        r"resumed from its state after event 20, it decided differently than without a break; state\(\) must return all",
    ),
    (LoadsNothing, "resumed from its state after event 20, it decided differently"),
    (Writes, "it modified, after its decision, the change that it returned for version 1"),
]


@pytest.mark.parametrize(("policy", "says"), KIT_FAULTS, ids=[kind.__name__ for kind, _ in KIT_FAULTS])
def test_the_kit_finds_every_fault(policy: type, says: str) -> None:
    """AssertionError that names the policy and the run, and shows the events that led there."""
    with pytest.raises(AssertionError, match=says) as raised:
        check_policy(policy)
    said = str(raised.value)
    assert said.startswith(f"The merge policy {policy.__name__} fails with seed ")
    assert " heads, 40 events, when='" in said
    assert "\nEvents" in said
    assert re.search(r"\n  \d+\.\d{3} (head \d contributes|the time until which)", said)


def test_a_head_that_does_not_exist_is_named_as_in_a_run() -> None:
    """Not an error of the kit's own."""
    with pytest.raises(AssertionError, match=r"decided about heads \[99\], but those with a contribution are \[0\]"):
        check_policy(lambda: names_a_stranger)


@pytest.mark.sweep
def test_a_good_policy_passes_whatever_its_form() -> None:
    """A class, an object, a function, a name."""

    def rule(pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
        return {p.head: 0.5 / roster.num_heads for p in pending}

    check_policy(Remembering)
    check_policy(Average, heads=[3], seeds=[1], events=200)
    check_policy(lambda: rule)
    check_policy(lambda: "nesterov", when=["quorum"])


def test_a_deadline_of_its_own_is_kept() -> None:
    """A policy may wait for a time, if it decides then."""

    class Patient:
        """Merges the pending contributions a second after the first arrived, or all."""

        def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
            if not pending:
                return Wait()
            until = min(p.arrived for p in pending) + 1.0
            if roster.now >= until or len(pending) >= len(roster.live):
                return Merge({p.head: 1 / roster.num_heads for p in pending})
            return Wait("for others", until)

    check_policy(Patient, seeds=range(6))


def test_what_is_no_policy_is_a_config_error() -> None:
    """As at the start of a run."""
    with pytest.raises(ConfigError, match="without a merge"):
        check_policy(lambda: 3)
