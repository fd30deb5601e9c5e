"""The paper's merge: wait for all live heads, then average their products."""

from __future__ import annotations

from collections.abc import Sequence

from lte_ray.merging.policy import Decision, Merge, Pending, Roster, Wait


class Average:
    """W_{v+1} = W_v + 1/N sum_n s (B_n A_n - B'_n A'_n) over all N heads (LTE, eq. 7; reset-less, appendix).

    Each head counts 1/N with N the number of heads configured, so that N single arrivals equal one merge of all.
    """

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        missing = roster.live - {p.head for p in pending}
        if missing or not pending:
            return Wait(f"for heads {sorted(missing)}")
        return Merge({p.head: 1 / roster.num_heads for p in pending})
