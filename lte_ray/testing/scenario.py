"""A run of random events in the engine: a coordinator, heads that do random walks, and an observed policy."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.engine.settings import Settings
from lte_ray.errors import PolicyError
from lte_ray.merging.policies.trigger import get_policy_state, load_policy_state
from lte_ray.merging.policy import MergePolicy
from lte_ray.messages import Contribution
from lte_ray.testing.heads import RandomWalkHead, make_test_plan
from lte_ray.testing.observed_policy import ObservedPolicy, Violation

TICKS = 100
"""How often a policy may wait again while all live heads wait for it."""

TOLERANCE = 1e-12
"""Relative to the sum of all changes' norms: allows for some hundred float64 sums and products of inner size 2."""


class Scenario:
    """Plays random events, and checks after each that the base contains exactly what was decided.

    Args:
        policy: the policy under test.
        remake: creates the policy again, to resume it from its state.
        num_heads: heads at the start; odd seeds run with ``reset="B"``.
        seed: seed of the events and of the heads' contributions.
        resumed_at: the event at which to resume the policy, if any.
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
        self.policy = ObservedPolicy(policy, lambda head: self.heads[head].change(), plans[0], self.trace.append)
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
        """Plays `events` random events, then lets all heads leave.

        Raises:
            Violation: the policy violates a requirement.
        """
        for event in range(events):
            if self.resumed_at is not None and event >= self.resumed_at and self.coordinator.candidate is None:
                self._resume()
            self._pass_time(self.random.expovariate(1.0))
            self._random_event()
        self._end()

    def _resume(self) -> None:
        state = {name: tensor.clone() for name, tensor in get_policy_state(self.policy.policy).items()}
        self.policy.policy, self.resumed_at = self.remake(), None
        if state:
            load_policy_state(self.policy.policy, state)

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
                head.train(1)  # while its contribution is pending

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
        nan = torch.full((head.plan.contribution.size,), torch.nan, dtype=torch.float64)
        self.trace.append(f"{self.now:.3f} head {head.number} sends NaN, which is refused")
        self.coordinator.receive(self._record(head), nan)

    def _leave(self, head: RandomWalkHead) -> None:
        self._play(f"head {head.number} leaves", lambda: self.coordinator.leave(head.number))

    def _evaluate_trial(self) -> None:
        candidate, trial_change, self.policy.trial_change = self.coordinator.candidate, self.policy.trial_change, None
        assert candidate is not None and trial_change is not None
        self._compare(candidate, self.initial_base + self.total_change + trial_change, "the candidate base")
        loss = float(candidate.double().square().mean()) + self.random.random()
        self._play(
            f"the evaluation of the candidate base gives {loss:.6g}",
            lambda: self.coordinator.receive_evaluation({"loss": loss}),
            trial_change,
        )

    def _pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        for _ in range(TICKS):
            wakes = self.coordinator.wakes_at
            if wakes is None or wakes > until:
                self.now = until
                return
            self.now = max(self.now, wakes)
            self._play("the time until which the policy waited has come", self.coordinator.tick)
        raise Violation(f"it asked to be called {TICKS} times within {seconds:.3f} seconds, and never decided")

    def _play(self, event: str, execute: Callable[[], EventResult], trial_change: Tensor | None = None) -> None:
        self.trace.append(f"{self.now:.3f} {event}")
        try:
            event_result = execute()
        except PolicyError as error:
            if isinstance(error.__cause__, Violation):
                raise error.__cause__ from error
            raise Violation(str(error)) from error
        if trial_change is not None and event_result.results[0].accepted:  # the trial is merged before anything else
            self.policy.expected_changes.insert(0, trial_change)
        for result in event_result.results:
            head = self.heads[result.head]
            if head.contribution is None or head.result is not None or result.sequence != head.sequence:
                raise Violation(f"head {result.head}'s contribution {result.sequence} was decided twice")
            head.result = result
            if result.accepted:
                head.record_acceptance(self.reset)
        for change in self.policy.expected_changes:
            self.total_change += change
            self.total_norm += float(change.norm())
        self.policy.expected_changes.clear()
        self._compare(self.base, self.initial_base + self.total_change, "W_v - W_0")

    def _compare(self, actual: Tensor, expected: Tensor, what: str) -> None:
        error = float((actual - expected).norm())
        if not error <= TOLERANCE * (1 + self.total_norm + float(self.initial_base.norm())):
            raise Violation(f"{what} differs from the sum of all that was decided by {error:g}")

    def _end(self) -> None:
        """Lets heads without a pending contribution leave; the others must get a decision."""
        for _ in range(TICKS):
            if self.coordinator.candidate is not None:
                self._evaluate_trial()
            elif idle := [h for h in sorted(self.coordinator.live) if h not in self.coordinator.pending_heads]:
                self._leave(self.heads[idle[0]])
            elif not self.coordinator.pending_heads:
                return
            elif self.coordinator.wakes_at is not None:
                self._pass_time(max(0.0, self.coordinator.wakes_at - self.now))
            else:
                break
        waiting = self.coordinator.pending_heads
        raise Violation(f"it never decides about heads {waiting}, though no other head is left to wait for")
