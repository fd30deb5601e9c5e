"""Asks a merge policy, and checks that what it decides can be carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lte_ray.engine.coordinator.aggregator import NeedsTensors
from lte_ray.errors import PolicyError
from lte_ray.merging.policies.trigger import get_policy_state, load_policy_state
from lte_ray.merging.policy import Decision, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Try, Wait
from lte_ray.messages import OuterStep, StepCoefficients

MAX_WAITS = 20
"""How often in a row a policy may ask to be woken once every live head has contributed."""

MAX_WEIGHT = 1e6
"""Bound on the weight that a policy may give a contribution, and on the coefficients of its outer steps."""


class CheckedPolicy:
    """A merge policy whose decisions are checked; errors name it.

    Args:
        policy: the user's.
        shards: how many coordinator shards the tensors are in, for errors.
        local: whether it may read tensors and give a change of its own.
        size: elements of the base.
        dtype: of merging.
    """

    def __init__(self, policy: MergePolicy, shards: int, local: bool, size: int, dtype: torch.dtype) -> None:
        self._policy, self._shards, self._local, self._size, self._dtype = policy, shards, local, size, dtype
        self._waits = 0  # in a row, though no other head was to come

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        """The policy's next decision.

        Raises:
            PolicyError: it raised, or decided something impossible, or waits forever.
        """
        decision = self._call(lambda: self._policy.decide(pending, roster))
        if not isinstance(decision, Wait | Merge | MergeChange | Discard | Try):
            raise PolicyError(
                f"{self._name} decided {decision!r}; a decision is one of Wait, Merge, MergeChange, Discard and Try."
            )
        if not self._local and isinstance(decision, MergeChange | Try):
            raise self._needs_tensors(f"decided a {type(decision).__name__}")
        # The lengths are compared first: usually they differ, and then no set is built, as it would be at each contribution.
        everyone = len(pending) >= max(1, len(roster.live)) and roster.live <= {p.head for p in pending}
        stuck = isinstance(decision, Wait) and everyone
        self._waits = self._waits + 1 if stuck else 0
        if isinstance(decision, Wait) and stuck and (decision.until is None or self._waits > MAX_WAITS):
            raise PolicyError(
                f"{self._name} waits {decision.reason or 'for something'}, but every live head {sorted(roster.live)} "
                "has contributed and waits for it: the run could never go on."
            )
        return decision

    def judge(self, trial: Try, values: Mapping[str, float]) -> Merge | MergeChange | Discard:
        """The policy's decision after the evaluation of a base that it tried.

        Raises:
            PolicyError: it raised, or its judgement is neither the merge that was tried nor a discard.
        """
        decision: Merge | MergeChange | Discard = self._call(lambda: trial.judge(values))
        if decision is not trial.merge and not isinstance(decision, Discard):
            raise PolicyError(f"{self._name} judged {decision!r}; it must give the merge that was tried, or a Discard.")
        return decision

    def heads(self, decision: Merge | MergeChange | Discard, pending: Collection[int]) -> list[int]:
        """The heads that a decision settles, sorted.

        Args:
            decision: the policy's.
            pending: the heads with a contribution.

        Raises:
            PolicyError: it names none, one twice, or one without a contribution.
        """
        heads: Any = decision.weights if isinstance(decision, Merge) else decision.heads
        try:
            named = list(heads)
            known = set(named) <= set(pending)
        except TypeError:
            named, known = [heads], False
        if not named or not known or len(set(named)) != len(named):
            raise PolicyError(f"{self._name} decided about heads {named}, but those with a contribution are {sorted(pending)}.")
        return sorted(named)

    def weights(self, decision: Merge | MergeChange, heads: Sequence[int]) -> dict[int, float]:
        """The weight of each head's contribution; empty for a change.

        Raises:
            PolicyError: one isn't a finite number below `MAX_WEIGHT`.
        """
        return {} if isinstance(decision, MergeChange) else {head: self._weight(decision.weights[head], head) for head in heads}

    def outer_step(self, decision: Merge | MergeChange) -> OuterStep | None:
        """The step that a merge by weights takes; None if it adds the sum of the changes.

        Raises:
            PolicyError: it isn't an OuterStep, or one of its coefficients isn't a finite number below `MAX_WEIGHT`.
        """
        if isinstance(decision, MergeChange) or decision.step is None:
            return None
        step: Any = decision.step
        parts: tuple[Any, ...] = (step.factors, step.replicas) if isinstance(step, OuterStep) else ()
        if not parts or not all(isinstance(part, StepCoefficients) for part in parts):
            raise PolicyError(
                f"{self._name} gave a merge the step {step!r}; it must be an OuterStep with StepCoefficients for the factors "
                "and for the replicas."
            )
        return OuterStep(*(self._coefficients(part) for part in parts))

    def change(self, decision: Merge | MergeChange) -> Tensor | None:
        """The change that the policy made itself, in the type of merging; None if it gave weights.

        Raises:
            PolicyError: it isn't finite, or not flat in the base layout.
        """
        if isinstance(decision, Merge):
            return None
        unchecked: Any = decision.change
        if not isinstance(unchecked, Tensor) or unchecked.shape != (self._size,):
            shape = tuple(unchecked.shape) if isinstance(unchecked, Tensor) else type(unchecked).__name__
            raise PolicyError(
                f"{self._name} gave a change of shape {shape}; it must be finite and flat, {(self._size,)}, in the base layout."
            )
        change: Tensor = unchecked.to(self._dtype)
        if not bool(torch.isfinite(change).all()):
            raise PolicyError(f"{self._name} gave a change that holds NaN or infinity; it must be finite.")
        return change

    def state(self) -> dict[str, Tensor]:
        """What the policy keeps from one merge to the next. The tensors may be the policy's own."""
        return get_policy_state(self._policy)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        load_policy_state(self._policy, tensors)

    def _coefficients(self, given: StepCoefficients) -> StepCoefficients:
        values: dict[str, Any] = {field.name: getattr(given, field.name) for field in fields(given)}
        for name, value in values.items():
            if not _is_bounded(value):
                raise PolicyError(
                    f"{self._name} gave a step whose {name} is {value!r}; it must be a finite number below {MAX_WEIGHT:g}."
                )
        return StepCoefficients(**{name: float(value) for name, value in values.items()})

    def _weight(self, weight: Any, head: int) -> float:
        if not _is_bounded(weight):
            raise PolicyError(
                f"{self._name} gave head {head} the weight {weight!r}; it must be a finite number below {MAX_WEIGHT:g}."
            )
        return float(weight)

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except NeedsTensors:
            raise self._needs_tensors("looked at the tensors of a contribution") from None
        except Exception as error:
            raise PolicyError(f"{self._name} raised {type(error).__name__}: {error}") from error

    def _needs_tensors(self, what: str) -> PolicyError:
        return PolicyError(
            f"{self._name} {what}, which needs --shards 1, but --shards is {self._shards}: the tensors are then in other "
            "processes, and a policy can only give weights."
        )

    @property
    def _name(self) -> str:
        return f"The merge policy {getattr(self._policy, 'name', None) or type(self._policy).__name__}"


def _is_bounded(value: Any) -> bool:
    return isinstance(value, Real) and abs(float(value)) < MAX_WEIGHT
