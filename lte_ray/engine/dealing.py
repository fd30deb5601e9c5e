"""Lanes dealt out anew, for a run that resumes with another number of heads."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from lte_ray.data.lanes import Lane, Lanes, advance, density, initial, joined, split


def dealt(owners: Mapping[int, Lanes], free: Iterable[Lane], num_heads: int) -> dict[int, Lanes]:
    """The same slots, owned by the heads 0 to num_heads - 1; the same for the same arguments.

    - If these heads own them all, nothing changes.
    - If all slots before some K are merged and none after it, as in a run that merges at barriers, slot K + i goes to head
      (K + i) mod num_heads, as if there had never been other heads.
    - Else the lanes of heads that are left out, and free ones, are dealt out, the densest first: one to each head that has
      none, then each to the head that holds the smallest share of the slots. For a head that still has none, the
      one with the largest share gives half of its lanes (ties: the lowest number).

    Raises:
        ValueError: num_heads is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"the data can't be shared out among {num_heads} heads")
    heads, left = range(num_heads), [*free]
    if not left and set(owners) == set(heads):
        return dict(owners)
    every = [*left, *(lane for lanes in owners.values() for lane in lanes)]
    if (fresh := _fresh(every, num_heads)) is not None:
        return fresh
    found = {head: owners.get(head, ()) for head in heads}
    left += [lane for head, lanes in owners.items() if head not in found for lane in lanes]
    poorest = [(bool(lanes), density(lanes), head) for head, lanes in found.items()]
    heapq.heapify(poorest)
    for lane in sorted(joined(left), key=lambda lane: (lane.stride, lane.next)):
        _, share, head = poorest[0]
        found[head] = (*found[head], lane)
        heapq.heapreplace(poorest, (True, share + density([lane]), head))
    richest = [(-share, head) for _, share, head in poorest]
    heapq.heapify(richest)
    for head in heads:
        if not found[head]:
            giver = richest[0][1]
            found[giver], found[head] = split(found[giver])
            heapq.heapreplace(richest, (-density(found[giver]), giver))
            heapq.heappush(richest, (-density(found[head]), head))
    return {head: joined(lanes) for head, lanes in found.items()}


def _fresh(lanes: list[Lane], num_heads: int) -> dict[int, Lanes] | None:
    """The lanes of `num_heads` heads from the first slot that isn't merged on; None if one after it is."""
    first = min(lane.next for lane in lanes)
    if any(lane.next - lane.stride >= first for lane in lanes):
        return None
    taken = {head: len(range(head, first, num_heads)) for head in range(num_heads)}
    return {head: advance(initial(head, num_heads), batches) for head, batches in taken.items()}
