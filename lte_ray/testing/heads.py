"""Heads that do random walks instead of training, and their changes computed densely."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.messages import ContributionResult


def make_test_plan(rank: int) -> Plan:
    """Returns a plan with two weights, one stored transposed, and two replicas; `rank` is that of the first weight."""
    weights = (Adapted("wide", (5, 4), rank, 1.5), Adapted("turned", (4, 6), 2, 0.5, transposed=True))
    return Plan(weights, (Replica("bias", (3,)), Replica("scale", ())))


@dataclass
class RandomWalkHead:
    """One head, flat and in float64.

    Attributes:
        number: the head's number.
        plan: the head's plan.
        random: the generator of its random walk.
        version: the base version that it has adopted.
        step: its local steps so far.
        contributed_step: the step of its last accepted contribution.
        sequence: the number of its last contribution.
        reference: the factors that the base contains of it; None if B' = 0.
        contribution: the contribution that has no result yet, or whose result it hasn't adopted.
        result: the result that it hasn't adopted yet.
        values: its factors, then its replica changes.
    """

    number: int
    plan: Plan
    random: torch.Generator
    version: int = 0
    step: int = 0
    contributed_step: int = 0
    sequence: int = 0
    reference: Tensor | None = None
    contribution: Tensor | None = None
    result: ContributionResult | None = None
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = self._noise()
        for entry in self.plan.contribution.entries:
            if entry.name.endswith(".lora_B") or not entry.name.endswith(".lora_A"):
                self.values[entry.offset : entry.offset + entry.size] = 0

    def train(self, steps: int) -> None:
        """Takes local steps: adds noise to the values."""
        self.step += steps
        self.values += 0.1 * steps * self._noise()

    def contribute(self) -> Tensor:
        """Returns a new contribution, in the plan's contribution layout."""
        self.sequence += 1
        self.contribution = self.values.clone()
        return self.contribution

    def adopt(self, version: int, reset: str) -> None:
        """Adopts the result of its contribution and the base of `version`; with reset B, sets B to 0 if it was accepted."""
        assert self.result is not None and self.contribution is not None
        if self.result.accepted:
            self.contributed_step = self.step
            size = self.plan.factors_size
            self.values[size:] -= self.contribution[size:]
            if reset == "B":
                for spec in self.plan.adapted:
                    entry = next(e for e in self.plan.contribution.entries if e.name == spec.b_name)
                    self.values[entry.offset : entry.offset + entry.size] = 0
        self.version, self.contribution, self.result = version, None, None

    def record_acceptance(self, reset: str) -> None:
        """Updates the reference: the base contains the contribution from now on."""
        assert self.contribution is not None
        self.reference = None if reset == "B" else self.contribution[: self.plan.factors_size].clone()

    def change(self) -> Tensor:
        """Returns the contribution's dense, flat change at weight 1: s (B A - B' A') per weight, then the replica changes."""
        assert self.contribution is not None
        new = _named(self.plan, self.contribution)
        old = {} if self.reference is None else _named(self.plan, self.reference)
        parts = []
        for spec in self.plan.adapted:
            product = new[spec.b_name] @ new[spec.a_name]
            if old:
                product = product - old[spec.b_name] @ old[spec.a_name]
            product = spec.scaling * product
            parts.append((product.t() if spec.transposed else product).reshape(-1))
        return torch.cat([*parts, self.contribution[self.plan.factors_size :]])

    def _noise(self) -> Tensor:
        return torch.randn(self.plan.contribution.size, generator=self.random, dtype=torch.float64)


def _named(plan: Plan, flat: Tensor) -> dict[str, Tensor]:
    entries = [e for e in plan.contribution.entries if e.offset + e.size <= flat.numel()]
    return {e.name: flat[e.offset : e.offset + e.size].reshape(e.shape) for e in entries}
