"""Lanes: who takes which batches of the data order, in a form that can be handed on and split while a run is on.

All heads share one endless order of batches, numbered 0, 1, 2, ... (slots). A lane is an arithmetic progression of slots. The
lanes of all heads together hold each slot that isn't taken yet exactly once, so that heads that leave or join neither
repeat a batch nor skip one: a lane goes to another head with the slot that it has come to, or is split between two.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple


class Partition(NamedTuple):
    """The slots next, next + stride, next + 2 stride, ...

    Attributes:
        next: the first slot that isn't taken yet.
        stride: the distance between two slots, at least 1.
    """

    next: int
    stride: int


Partitions = tuple[Partition, ...]
"""What one head owns, by the next slot: no slot is in two of them. The head always takes the smallest slot."""


def initial(head: int, num_heads: int) -> Partitions:
    """What a head owns at the start: the slots head, head + num_heads, head + 2 num_heads, ...

    Raises:
        ValueError: `head` isn't in [0, num_heads).
    """
    if not 0 <= head < num_heads:
        raise ValueError(f"head {head} of {num_heads} heads has no lane at the start; give the lanes that it owns")
    return (Partition(head, num_heads),)


def ordered(lanes: Iterable[tuple[int, int]]) -> Partitions:
    """Lanes from pairs of numbers, by the next slot.

    Raises:
        ValueError: a number is no integer, a slot is below 0, or a stride below 1.
    """
    found = [tuple(lane) for lane in lanes]
    for lane in found:
        whole = len(lane) == 2 and all(isinstance(number, int) and not isinstance(number, bool) for number in lane)
        if not whole or lane[0] < 0 or lane[1] < 1:
            raise ValueError(f"{lane} is no lane: it needs a slot, at least 0, and a stride, at least 1")
    return tuple(sorted(Partition(*lane) for lane in found))


def slots(lanes: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The slots of these lanes in ascending order, without end (at once at its end if there are no lanes)."""
    return heapq.merge(*(itertools.count(first, stride) for first, stride in lanes))


def advance(lanes: Iterable[tuple[int, int]], batches: int) -> Partitions:
    """The lanes after their `batches` smallest slots were taken, in a time that doesn't grow with `batches`.

    Of several lanes, those up to slot x hold sum over (n, s) of max(0, floor((x - n) / s) + 1) slots; the x that makes this
    `batches` is found by bisection, with log2(batches x the smallest stride) counts.

    Raises:
        ValueError: `batches` is below 0, or there are no lanes to take any from.
    """
    found = ordered(lanes)
    if batches < 0 or (batches and not found):
        raise ValueError(f"can't take {batches} batches from {len(found)} lanes")
    if not batches:
        return found
    low = found[0].next  # the last slot taken is in [low, high]: the densest lane alone has enough up to high
    high = max(low, min(n + (batches - 1) * s for n, s in found))
    while low < high:
        middle = (low + high) // 2
        if sum(_up_to(lane, middle) for lane in found) < batches:
            low = middle + 1
        else:
            high = middle
    return tuple(sorted(Partition(lane.next + _up_to(lane, low) * lane.stride, lane.stride) for lane in found))


def _up_to(lane: Partition, slot: int) -> int:
    return max(0, (slot - lane.next) // lane.stride + 1)


def split(lanes: Iterable[tuple[int, int]]) -> tuple[Partitions, Partitions]:
    """What a head that gives half of its lanes away keeps, and what it gives.

    One lane (n, s) becomes (n, 2s), which is kept, and (n + s, 2s). Of several, densest first, every other one is given.

    Raises:
        ValueError: there are no lanes.
    """
    found = sorted(ordered(lanes), key=lambda lane: (lane.stride, lane.next))
    if not found:
        raise ValueError("there are no lanes to give away")
    if len(found) == 1:
        ((first, stride),) = found
        return (Partition(first, 2 * stride),), (Partition(first + stride, 2 * stride),)
    return ordered(found[::2]), ordered(found[1::2])


def joined(lanes: Iterable[tuple[int, int]]) -> Partitions:
    """The same slots in fewer lanes: (n, 2s) and (n + s, 2s) become (n, s) again, as long as there are such."""
    found = set(ordered(lanes))
    fresh = sorted(found, key=lambda lane: -lane.stride)
    while fresh:
        lane = fresh.pop()
        half = lane.stride // 2
        if lane not in found or lane.stride % 2:
            continue
        for first, second in (
            (lane, Partition(lane.next + half, lane.stride)),
            (Partition(lane.next - half, lane.stride), lane),
        ):
            if first in found and second in found:
                whole = Partition(first.next, half)
                found -= {first, second}
                found.add(whole)
                fresh.append(whole)
                break
    return tuple(sorted(found))


def density(lanes: Iterable[tuple[int, int]]) -> Fraction:
    """The share of all slots, far ahead, that these lanes hold: the sum of 1 / stride. It is 1 for all heads together."""
    strides = Counter(stride for _, stride in lanes)
    return sum((Fraction(count, stride) for stride, count in strides.items()), Fraction(0))


def disjoint(lanes: Iterable[tuple[int, int]]) -> bool:
    """Whether no slot is in two of these lanes, also far ahead: (n, s) and (m, t) meet if n = m modulo gcd(s, t)."""
    starts: defaultdict[int, list[int]] = defaultdict(list)
    for first, stride in lanes:
        starts[stride].append(first)
    for stride, firsts in starts.items():
        if len({first % stride for first in firsts}) < len(firsts):
            return False
    for (s, some), (t, others) in itertools.combinations(starts.items(), 2):
        shared = math.gcd(s, t)
        if not {n % shared for n in some}.isdisjoint(m % shared for m in others):
            return False
    return True


def continues(lanes: Iterable[tuple[int, int]], before: Iterable[tuple[int, int]]) -> bool:
    """Whether `lanes` are what is left of `before` once some slots are taken and lanes perhaps split."""
    found, owned = ordered(lanes), ordered(before)
    inside = all(any(n >= m and s % t == 0 and (n - m) % t == 0 for m, t in owned) for n, s in found)
    return inside and density(found) == density(owned) and disjoint(found)
