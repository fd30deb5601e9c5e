"""What a head has trained, relative to the base: its factors and replicas, their references, and its positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lte_ray.engine.head.loss import Figures
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import (
    base_replicas,
    copy_rounded,
    factor_views,
    factors_part,
    gather,
    replica_part,
    replica_views,
)
from lte_ray.messages import CommittedPosition


@dataclass
class HeadState:
    """All of a head that changes as it trains, except what its optimizer, generators and batch stream keep themselves.

    Attributes:
        plan: what the head trains.
        reset: as `LTEConfig.reset`.
        dtype: of everything that is merged.
        device: where the head trains.
        factors: A and B by name; the model's own parameters.
        replicas: replica parameters and buffers by name; the model's own.
        reference: the factors (A', B') that the adopted base holds of this head, flat; None where B' = 0.
        replica_reference: the adopted base's replicas p', flat; None before the head has started.
        pending: the contribution that has no answer yet, as receivers decode it, flat; None if there is none. Never written to.
        merged: the position at the last contribution that the head knows was merged.
        contributed: the position at the last contribution.
        version: of the adopted base.
        step: local steps taken since the run began.
        samples: samples trained on since the run began.
        sequence: number of the last contribution.
        losses: of the steps since the last contribution.
        loss: mean loss of the last contribution; NaN before the first.
        figures: the worker's own, of the same steps as `losses`.
    """

    plan: Plan
    reset: str
    dtype: torch.dtype
    device: torch.device
    factors: Mapping[str, Tensor]
    replicas: Mapping[str, Tensor]
    merged: CommittedPosition
    contributed: CommittedPosition
    reference: Tensor | None = None
    replica_reference: Tensor | None = None
    pending: Tensor | None = None
    version: int = 0
    step: int = 0
    samples: int = 0
    sequence: int = 0
    losses: list[Tensor] = field(default_factory=list)
    loss: float = float("nan")
    figures: Figures = field(default_factory=Figures)

    def __post_init__(self) -> None:
        # Where there is no reference: each A as last merged, or as drawn, which `rewind` restores.
        self._merged_a = {spec.a_name: self.factors[spec.a_name].detach().to("cpu", copy=True) for spec in self.plan.adapted}

    def close_losses(self) -> dict[str, float]:
        """Sets `loss` to the mean of `losses` (left as it is if there are none) and empties the list.

        Returns:
            The means of the worker's figures over the same steps.
        """
        if self.losses:
            self.loss = float(torch.stack(self.losses).double().mean())
        self.losses = []
        return self.figures.close()

    # -- what the head has trained ---------------------------------------------------------------------------------------

    def gather_contribution(self) -> Tensor:
        """The factors and replica changes in a new flat buffer, in the plan's contribution layout."""
        return gather(self.plan.contribution, {**self.factors, **self.replica_changes()}, self.dtype, self.device)

    def replica_changes(self) -> dict[str, Tensor]:
        """p - p' of each replica: what was trained since the adopted base."""
        assert self.replica_reference is not None, "start() comes first"
        before = replica_views(self.plan, self.replica_reference)
        return {name: p.detach().to(self.dtype) - before[name] for name, p in self.replicas.items()}

    def replica_changes_beyond(self, contained: Tensor | None) -> dict[str, Tensor]:
        """p - p' of each replica, less what the contribution `contained` (flat) holds of it; empty before the start."""
        if self.replica_reference is None:
            return {}
        changes = self.replica_changes()
        if contained is not None:
            for name, contributed in replica_views(self.plan, replica_part(self.plan, contained)).items():
                changes[name] -= contributed
        return changes

    # -- rebasing --------------------------------------------------------------------------------------------------------

    def set_reference(self, contained: Tensor) -> None:
        """A', B' := A^c, B^c of the contribution `contained`, which was merged; with reset, B := 0 and no reference.

        With reset, no step may have been taken since that contribution.
        """
        if self.reset == "B":
            self.reference, factors = None, factor_views(self.plan, factors_part(self.plan, contained))
            for spec in self.plan.adapted:
                self.factors[spec.b_name].zero_()
                self._merged_a[spec.a_name] = factors[spec.a_name]
        else:
            self.reference, self._merged_a = factors_part(self.plan, contained), {}

    @torch.no_grad()
    def rebase_replicas(self, base: Tensor, ahead: Mapping[str, Tensor]) -> None:
        """p' := the replicas of `base` (flat), and p := p' + `ahead`, which may be empty."""
        self.replica_reference = base_replicas(self.plan, base).to(self.device, copy=True)
        before = replica_views(self.plan, self.replica_reference)
        for name, tensor in self.replicas.items():
            copy_rounded(tensor, before[name] + ahead[name] if ahead else before[name])
            if tensor.dtype != self.dtype:  # p' is what this head really adopted, rounded; else every merge counts the rounding
                before[name].copy_(tensor.to(self.dtype) - ahead[name] if ahead else tensor)

    # -- going back ------------------------------------------------------------------------------------------------------

    def resume_at(self, position: CommittedPosition, reference: Tensor | None, incarnation: int) -> None:
        """Takes over a position and the factors that a base holds of this head; B := 0 if there are none."""
        self.step, self.samples, self.sequence = position.step, position.samples, position.sequence
        self.merged = self.contributed = replace(position, incarnation=incarnation)
        self.reference = None if reference is None else reference.to(self.device)
        self.reset_factors()

    @torch.no_grad()
    def drop_unmerged(self) -> None:
        """A, B := A', B' and p := p': drops all that was trained since the last merged contribution."""
        assert self.pending is None and self.replica_reference is not None
        self.reset_factors()
        for name, value in self._merged_a.items() if self.reference is None else ():
            self.factors[name].copy_(value)
        for name, value in replica_views(self.plan, self.replica_reference).items():
            copy_rounded(self.replicas[name], value)
        self.losses = []
        self.figures.load({})

    @torch.no_grad()
    def reset_factors(self) -> None:
        """A, B := A', B'; without a reference B := 0, and A stays."""
        if self.reference is not None:
            for name, value in factor_views(self.plan, self.reference).items():
                self.factors[name].copy_(value)
            return
        for spec in self.plan.adapted:
            self.factors[spec.b_name].zero_()
