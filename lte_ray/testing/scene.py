"""One run of random events in the engine: a coordinator, walking heads and a watched policy."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.coordinator import Coordinator, StepResult
from lte_ray.engine.settings import Settings
from lte_ray.errors import PolicyError
from lte_ray.merging.policies.trigger import get_policy_state, load_policy_state
from lte_ray.merging.policy import MergePolicy
from lte_ray.messages import Contribution
from lte_ray.testing.heads import RandomWalkHead, make_test_plan
from lte_ray.testing.watched import ObservedPolicy, Violation

TICKS = 100
"""Times that a policy may put off what all live heads wait for."""

TOLERANCE = 1e-12
"""Of the ledger, relative to the sum of all changes' norms: some hundred float64 sums and products of inner size 2."""


class Scenario:
    """Plays random events, and checks after each that the base holds exactly what was decided.

    Args:
        policy: the policy under test.
        remake: makes it anew, for the resumption at event `resumed_at`.
        num_heads: heads at the start; odd seeds run with ``reset="B"``.
        seed: of the events and of what the heads contribute.
    """

    def __init__(
        self, policy: MergePolicy, remake: Callable[[], MergePolicy], num_heads: int, seed: int, resumed_at: int | None = None
    ) -> None:
        self.trace: list[str] = []
        self.now, self.remake, self.resumed_at = 0.0, remake, resumed_at
        self.random = random.Random(seed)
        self.reset = "B" if seed % 2 else "none"
        generator = torch.Generator().manual_seed(seed)
        plans = [make_test_plan(1 + head % 3) for head in range(num_heads)]
        self.heads = [RandomWalkHead(head, plan, generator) for head, plan in enumerate(plans)]
        self.initial_base = torch.randn(plans[0].base.size, generator=generator, dtype=torch.float64)
        self.total_change, self.total_norm = torch.zeros_like(self.initial_base), 0.0
        self.policy = ObservedPolicy(policy, lambda head: self.heads[head].change(), self.trace.append)
        lte = LTEConfig(num_heads=num_heads, reset=self.reset)  # type: ignore[arg-type]
        settings = Settings("conformance", lte, MergeConfig(), TrainConfig())
        self.coordinator = Coordinator(
            settings, plans[0], self.initial_base.clone(), self.policy, plans=plans, clock=lambda: self.now
        )

    @property
    def base(self) -> Tensor:
        """The merged weights and replicas, flat."""
        return self.coordinator.base

    def run(self, events: int) -> None:
        """Plays `events` random events, then lets all heads end.

        Raises:
            Violation: the policy doesn't hold to something.
        """
        for event in range(events):
            if self.resumed_at is not None and event >= self.resumed_at and self.coordinator.candidate is None:
                self._resume()
            self._pass_time(self.random.expovariate(1.0))
            self._random_event()
        self._end()

    def _resume(self) -> None:
        held = {name: tensor.clone() for name, tensor in get_policy_state(self.policy.policy).items()}
        self.policy.policy, self.resumed_at = self.remake(), None
        if held:
            load_policy_state(self.policy.policy, held)

    def _random_event(self) -> None:
        live = sorted(self.coordinator.live)
        if self.coordinator.candidate is not None and self.random.random() < 0.5:
            self._evaluate_trial()
        elif live:
            head, kind = self.heads[self.random.choice(live)], self.random.random()
            if kind < 0.04:
                self._leave(head)
            elif kind < 0.07:
                self._send_nan(head)
            elif head.result is not None:
                head.adopt(self.coordinator.version, self.reset)
            elif head.contribution is None:
                head.train(self.random.randint(1, 4))
                self._contribute(head)
            elif self.reset == "none":
                head.train(1)  # while its contribution is on the way

    def _contribute(self, head: RandomWalkHead) -> None:
        self._play(
            f"head {head.number} contributes {head.step - head.contributed_step} steps from version {head.version}",
            lambda: self.coordinator.receive(self._record(head), head.contribute()),
        )

    def _record(self, head: RandomWalkHead) -> Contribution:
        steps = head.step - head.contributed_step
        return Contribution(
            run="conformance",
            head=head.number,
            incarnation=0,
            sequence=head.sequence + 1,
            version=head.version,
            step=head.step,
            steps=steps,
            samples=8 * steps,
            loss=1 / (1 + head.step),
        )

    def _send_nan(self, head: RandomWalkHead) -> None:
        rubbish = torch.full((head.plan.contribution.size,), torch.nan, dtype=torch.float64)
        self.trace.append(f"{self.now:.3f} head {head.number} sends NaN, which is refused")
        self.coordinator.receive(self._record(head), rubbish)

    def _leave(self, head: RandomWalkHead) -> None:
        self._play(f"head {head.number} leaves", lambda: self.coordinator.leave(head.number))

    def _evaluate_trial(self) -> None:
        candidate, tried, self.policy.trial_change = self.coordinator.candidate, self.policy.trial_change, None
        assert candidate is not None and tried is not None
        self._compare(candidate, self.initial_base + self.total_change + tried, "the base that is tried")
        loss = float(candidate.double().square().mean()) + self.random.random()
        self._play(
            f"the evaluation of what is tried gives {loss:.6g}",
            lambda: self.coordinator.receive_evaluation({"loss": loss}),
            tried,
        )

    def _pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        for _ in range(TICKS):
            wakes = self.coordinator.wakes_at
            if wakes is None or wakes > until:
                self.now = until
                return
            self.now = max(self.now, wakes)
            self._play("the time has come that the policy waited for", self.coordinator.tick)
        raise Violation(f"it was asked {TICKS} times within {seconds:.3f} seconds, each time as it wanted, and never decided")

    def _play(self, event: str, happen: Callable[[], StepResult], tried: Tensor | None = None) -> None:
        self.trace.append(f"{self.now:.3f} {event}")
        try:
            outcome = happen()
        except PolicyError as error:
            if isinstance(error.__cause__, Violation):
                raise error.__cause__ from error
            raise Violation(str(error)) from error
        if tried is not None and outcome.results[0].accepted:  # what was tried is settled before anything else
            self.policy.expected_changes.insert(0, tried)
        for verdict in outcome.results:
            head = self.heads[verdict.head]
            if head.contribution is None or head.result is not None or verdict.sequence != head.sequence:
                raise Violation(f"head {verdict.head}'s contribution {verdict.sequence} was settled twice")
            head.result = verdict
            if verdict.accepted:
                head.record_acceptance(self.reset)
        for change in self.policy.expected_changes:
            self.total_change += change
            self.total_norm += float(change.norm())
        self.policy.expected_changes.clear()
        self._compare(self.base, self.initial_base + self.total_change, "W_v - W_0")

    def _compare(self, found: Tensor, expected: Tensor, what: str) -> None:
        error = float((found - expected).norm())
        if not error <= TOLERANCE * (1 + self.total_norm + float(self.initial_base.norm())):
            raise Violation(f"{what} differs from the sum of all that was decided by {error:g}")

    def _end(self) -> None:
        """Heads that owe nothing leave; the others must get their answer."""
        for _ in range(TICKS):
            if self.coordinator.candidate is not None:
                self._evaluate_trial()
            elif free := [h for h in sorted(self.coordinator.live) if h not in self.coordinator.pending_heads]:
                self._leave(self.heads[free[0]])
            elif not self.coordinator.pending_heads:
                return
            elif self.coordinator.wakes_at is not None:
                self._pass_time(max(0.0, self.coordinator.wakes_at - self.now))
            else:
                break
        waiting = self.coordinator.pending_heads
        raise Violation(f"it never decides about heads {waiting}, for which nobody else is left to wait")
