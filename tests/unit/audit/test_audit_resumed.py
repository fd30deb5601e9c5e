"""The audit of runs that are resumed with other heads, so that numbers are reused."""

from __future__ import annotations

from typing import Any

from lte_ray.audit import audit


def merge(version: int, held: dict[int, dict[str, Any]]) -> dict[str, Any]:
    rows = {
        str(head): {"incarnation": 0, "version": version, "batches": each["step"], "samples": 4 * each["step"], **each}
        for head, each in held.items()
    }
    steps = {str(head): 2 for head in held}
    return {"kind": "merge", "version": version, "heads": list(held), "head_steps": steps, "held": rows}


def test_a_head_that_starts_at_a_resume_is_a_new_one() -> None:
    """Four heads, then two, then four: heads 2 and 3 count from 1 again, with data that heads 0 and 1 had in between."""
    four = {head: {"sequence": 1, "step": 2, "lanes": [[8 + head, 4]]} for head in range(4)}
    two = {head: {"sequence": 2, "step": 4, "lanes": [[12 + head, 2]]} for head in range(2)}
    rows = [
        merge(1, four),
        {"kind": "event", "event": "resumed", "version": 1, "heads": 2, "anew": []},
        merge(2, two),
        {"kind": "event", "event": "resumed", "version": 2, "heads": 4, "anew": [2, 3]},
    ]
    again = {head: {"sequence": 3, "step": 6, "lanes": [[20 + head, 4]]} for head in range(2)}
    again |= {head: {"sequence": 1, "step": 2, "lanes": [[20 + head, 4]]} for head in (2, 3)}
    assert audit([*rows, merge(3, again)]).problems == []
    unsaid = audit([*rows[:-1], merge(3, again)])
    assert any("merges contribution 1" in problem for problem in unsaid.problems)
