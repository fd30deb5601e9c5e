"""Heads that don't train: their factors and replicas walk at random. And their changes, written out densely."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.messages import ContributionResult


def make_test_plan(rank: int) -> Plan:
    """A plan with two weights, one stored transposed, and two replicas; `rank` is that of the first weight."""
    weights = (Adapted("wide", (5, 4), rank, 1.5), Adapted("turned", (4, 6), 2, 0.5, transposed=True))
    return Plan(weights, (Replica("bias", (3,)), Replica("scale", ())))


@dataclass
class RandomWalkHead:
    """What one head holds, flat and in float64.

    Attributes:
        reference: the factors that the base holds of it; None where B' = 0.
        offered: the contribution that isn't answered yet.
        answer: the verdict that it hasn't adopted yet.
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
        self.values = self._noise()  # factors, then replica changes
        for entry in self.plan.contribution.entries:
            if entry.name.endswith(".lora_B") or not entry.name.endswith(".lora_A"):
                self.values[entry.offset : entry.offset + entry.size] = 0

    def train(self, steps: int) -> None:
        """Takes local steps."""
        self.step += steps
        self.values += 0.1 * steps * self._noise()

    def contribute(self) -> Tensor:
        """The contribution, in the plan's contribution layout."""
        self.sequence += 1
        self.contribution = self.values.clone()
        return self.contribution

    def adopt(self, version: int, reset: str) -> None:
        """Takes the answer and the base of `version` (DESIGN 3.4, 3.6, 3.7)."""
        assert self.result is not None and self.contribution is not None
        if self.result.accepted:
            self.contributed_step = self.step
            cut = self.plan.factors_size
            self.values[cut:] -= self.contribution[cut:]
            if reset == "B":
                for spec in self.plan.adapted:
                    entry = next(e for e in self.plan.contribution.entries if e.name == spec.b_name)
                    self.values[entry.offset : entry.offset + entry.size] = 0
        self.version, self.contribution, self.result = version, None, None

    def record_acceptance(self, reset: str) -> None:
        """The base holds the offered contribution from now on."""
        assert self.contribution is not None
        self.reference = None if reset == "B" else self.contribution[: self.plan.factors_size].clone()

    def change(self) -> Tensor:
        """What the offered contribution adds at weight 1: s (B A - B' A') of each weight, then the replica changes; flat."""
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
