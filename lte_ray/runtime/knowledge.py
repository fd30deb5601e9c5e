"""What a head's process knows of the run, from which a new coordinator goes on if the old one dies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lte_ray.layout import Plan
from lte_ray.merging.flat import factors_part
from lte_ray.messages import Contribution, HeadReport, Report, Standing, Update
from lte_ray.runtime.transport import Transport

NOWHERE = HeadReport(-1, 0)
"""Of a head that hasn't begun."""


@dataclass
class _Own:
    """Of a head here: its factors by the contribution that they follow (None where B' = 0), and what isn't answered yet.

    `ordered` is what orders say that came here, whether the head has taken them or is about to.
    """

    factors: dict[int, Tensor | None] = field(default_factory=dict)
    outstanding: Contribution | None = None
    ordered: HeadReport = NOWHERE


class Knowledge:
    """Keeps, beside training, the newest version that came here with what it holds, and this process's own contributions.

    Args:
        plans: all heads'.
        numbers: of the heads here.
        reset: as `LTEConfig.reset`.
    """

    def __init__(self, plans: Mapping[int, Plan], reset: str) -> None:
        self._plans, self._reset = plans, reset
        self._own = {number: _Own() for number in plans}
        self.version, self.held, self.ledger = -1, dict[int, Standing](), dict[str, Any]()

    def begins(self, head: int, sequence: int, factors: Tensor | None) -> None:
        """A head here starts with these factors in the base."""
        self._own[head].factors[sequence] = factors

    def offered(self, contribution: Contribution, flat: Tensor) -> None:
        """A head here sends a contribution; `flat` is what receivers make of it."""
        own, plan = self._own[contribution.head], self._plans[contribution.head]
        own.outstanding = contribution
        own.factors[contribution.sequence] = None if self._reset == "B" else factors_part(plan, flat)

    def learned(self, update: Update) -> None:
        """An update has come, and its base is here."""
        if update.verdict is not None and not update.verdict.accepted:
            self._settle(update.verdict.head, update.verdict.sequence, accepted=False)
        for head in self._own.keys() & update.orders.keys():
            own, order = self._own[head], update.orders[head]
            grant = max([own.ordered.grant, *(grant.id for grant in order.grants)])
            released = max(own.ordered.released, order.release)
            own.ordered = HeadReport(-1, max(own.ordered.limit, order.limit), grant, released)
        if update.version <= self.version:
            return
        self.version, self.held, self.ledger = update.version, update.held, update.ledger
        for head in self._own:
            if head in update.held:
                self._settle(head, update.held[head].sequence, accepted=True)

    def _settle(self, head: int, sequence: int, accepted: bool) -> None:
        own = self._own[head]
        if own.outstanding is None or own.outstanding.sequence != sequence:
            return
        own.outstanding = None
        own.factors = {s: f for s, f in own.factors.items() if (s == sequence) == accepted}

    def report(self, base: Tensor | None, positions: Mapping[int, HeadReport], transport: Transport) -> Report:
        """All of it, published; `positions` are those of the heads that have begun."""
        heads = {}
        for head, own in self._own.items():
            known = {s: None if f is None else transport.publish(f) for s, f in own.factors.items()}
            at, said = positions.get(head, NOWHERE), own.ordered
            limit, grant, released = (max(getattr(at, f), getattr(said, f)) for f in ("limit", "grant", "released"))
            heads[head] = HeadReport(at.step, limit, grant, released, known)
        return Report(self.version, None if base is None else transport.publish(base), self.held, self.ledger, heads)
