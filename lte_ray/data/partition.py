"""Partitions of the data order: the unit in which batches are assigned to heads, moved between heads and split during a run.

All heads share one endless order of batches, numbered 0, 1, 2, ... (slots). A partition is an arithmetic progression of
slots. The partitions of all heads together contain each slot that isn't trained yet exactly once, so heads can leave or join
without repeating or skipping a batch: a partition moves to another head together with its next slot, or is split in two.
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
    """The slots start, start + stride, start + 2 stride, ...

    Attributes:
        start: the first slot that isn't trained yet.
        stride: the distance between two slots, at least 1.
    """

    start: int
    stride: int


Partitions = tuple[Partition, ...]
"""The partitions of one head, sorted by start and disjoint. The head always trains the smallest slot next."""


def initial_partitions(head: int, num_heads: int) -> Partitions:
    """Returns the partitions of a head at the start of a run: the slots head, head + num_heads, head + 2 num_heads, ...

    Raises:
        ValueError: `head` isn't in [0, num_heads).
    """
    if not 0 <= head < num_heads:
        raise ValueError(f"head {head} of {num_heads} heads has no partition at the start; pass its partitions explicitly")
    return (Partition(head, num_heads),)


def to_partitions(pairs: Iterable[tuple[int, int]]) -> Partitions:
    """Converts (start, stride) pairs to partitions, sorted by start.

    Raises:
        ValueError: a number isn't an integer, a start is below 0, or a stride is below 1.
    """
    candidates = [tuple(pair) for pair in pairs]
    for pair in candidates:
        integers = len(pair) == 2 and all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
        if not integers or pair[0] < 0 or pair[1] < 1:
            raise ValueError(f"{pair} isn't a partition: it needs a start of at least 0 and a stride of at least 1")
    return tuple(sorted(Partition(*pair) for pair in candidates))


def slots(partitions: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Yields the slots of the partitions in ascending order, endlessly; yields nothing without partitions."""
    return heapq.merge(*(itertools.count(start, stride) for start, stride in partitions))


def advance(partitions: Iterable[tuple[int, int]], batches: int) -> Partitions:
    """Removes the `batches` smallest slots; the time doesn't grow linearly with `batches`.

    Up to slot x, the partitions contain sum over (n, s) of max(0, floor((x - n) / s) + 1) slots. Bisection finds the x where
    this equals `batches`, in log2(batches x the smallest stride) steps.

    Raises:
        ValueError: `batches` is below 0, or positive without partitions.
    """
    before = to_partitions(partitions)
    if batches < 0 or (batches and not before):
        raise ValueError(f"can't take {batches} batches from {len(before)} partitions")
    if not batches:
        return before
    # The last slot to remove is in [low, high]: one partition alone contains enough slots up to high.
    low = before[0].start
    high = max(low, min(start + (batches - 1) * stride for start, stride in before))
    while low < high:
        middle = (low + high) // 2
        if sum(_count_up_to(p, middle) for p in before) < batches:
            low = middle + 1
        else:
            high = middle
    return tuple(sorted(Partition(p.start + _count_up_to(p, low) * p.stride, p.stride) for p in before))


def _count_up_to(partition: Partition, slot: int) -> int:
    """Counts the partition's slots up to and including `slot`."""
    return max(0, (slot - partition.start) // partition.stride + 1)


def split(partitions: Iterable[tuple[int, int]]) -> tuple[Partitions, Partitions]:
    """Splits a head's partitions into those it keeps and those it gives up.

    A single partition (n, s) becomes (n, 2s), which is kept, and (n + s, 2s). Of several, sorted by stride, every other one is
    given up.

    Raises:
        ValueError: there are no partitions.
    """
    ranked = sorted(to_partitions(partitions), key=lambda p: (p.stride, p.start))
    if not ranked:
        raise ValueError("there are no partitions to split")
    if len(ranked) == 1:
        ((start, stride),) = ranked
        return (Partition(start, 2 * stride),), (Partition(start + stride, 2 * stride),)
    return to_partitions(ranked[::2]), to_partitions(ranked[1::2])


def coalesce(partitions: Iterable[tuple[int, int]]) -> Partitions:
    """Returns the same slots in fewer partitions: (n, 2s) and (n + s, 2s) become (n, s), repeatedly."""
    remaining = set(to_partitions(partitions))
    todo = sorted(remaining, key=lambda p: -p.stride)
    while todo:
        partition = todo.pop()
        half = partition.stride // 2
        if partition not in remaining or partition.stride % 2:
            continue
        for first, second in (
            (partition, Partition(partition.start + half, partition.stride)),
            (Partition(partition.start - half, partition.stride), partition),
        ):
            if first in remaining and second in remaining:
                union = Partition(first.start, half)
                remaining -= {first, second}
                remaining.add(union)
                todo.append(union)
                break
    return tuple(sorted(remaining))


def density(partitions: Iterable[tuple[int, int]]) -> Fraction:
    """Returns the fraction of all slots, far ahead, in these partitions: the sum of 1 / stride, 1 for all heads together."""
    strides = Counter(stride for _, stride in partitions)
    return sum((Fraction(count, stride) for stride, count in strides.items()), Fraction(0))


def are_disjoint(partitions: Iterable[tuple[int, int]]) -> bool:
    """Returns whether no slot, however far ahead, is in two partitions: (n, s) and (m, t) meet if n = m modulo gcd(s, t)."""
    by_stride: defaultdict[int, list[int]] = defaultdict(list)
    for start, stride in partitions:
        by_stride[stride].append(start)
    for stride, starts in by_stride.items():
        if len({start % stride for start in starts}) < len(starts):
            return False
    for (s, some), (t, others) in itertools.combinations(by_stride.items(), 2):
        divisor = math.gcd(s, t)
        if not {n % divisor for n in some}.isdisjoint(m % divisor for m in others):
            return False
    return True


def is_continuation(partitions: Iterable[tuple[int, int]], before: Iterable[tuple[int, int]]) -> bool:
    """Returns whether `partitions` are what remains of `before` after slots were trained and partitions perhaps split."""
    after, owned = to_partitions(partitions), to_partitions(before)
    inside = all(any(n >= m and s % t == 0 and (n - m) % t == 0 for m, t in owned) for n, s in after)
    return inside and density(after) == density(owned) and are_disjoint(after)
