"""Whether each batch of the data is in exactly one merge.

Each merge says which lanes of the data order (`data.lanes`) its heads go on with. All strides divide M, their least common
multiple, so the order is M progressions (classes) r, r + M, r + 2M, ..., of which a lane (n, s) is M/s. The audit follows for
each class how far it is merged. A merge must move its head's classes by as many batches as the contribution trained:

    more than it trained:   some are in no merge (lost)
    fewer:                  some are in two (doubled)

Where classes go from head to head meanwhile, a merge alone doesn't say who trained which: there the sums are compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from lte_ray.audit.found import Audit
from lte_ray.audit.rows import Stand
from lte_ray.data.lanes import Lanes, density, disjoint

MOST_CLASSES = 2**20
"""Of more, the batches aren't followed."""

NEARLY_ALL = 0.9
"""The share of merges that must agree on how many samples a batch has, for it to count as a fact of the run."""


def check_data(found: Audit, flat: Sequence[Stand]) -> None:
    """Follows the batches through these contributions, in the order of their merges, and adds what is wrong to `found`."""
    strides = {lane.stride for stand in flat for lane in stand.lanes}
    modulus = math.lcm(*strides)
    if flat and (modulus > MOST_CLASSES or not strides):
        why = f"their strides {sorted(strides)[:8]} have no small common multiple" if strides else "no row says whose which are"
        found.problems.append(f"the batches of the data can't be followed: {why}")
        return
    size, per_step = _samples_of_a_batch(flat), _batches_of_a_step(flat)
    reached: dict[int, int] = {}  # by class, the first batch that isn't merged
    owners: dict[int, int] = {}
    last: dict[int, Stand] = {}
    loose = 0  # batches by which classes that changed hands were moved, less those that were trained
    for stand in flat:
        now, before = _classes(stand.lanes, modulus), last.get(stand.head)
        taken = 0
        for place, first in now.items():
            moved = (first - reached.get(place, place)) // modulus
            if moved < 0:
                found.doubled -= moved
                found.problems.append(f"version {stand.version} takes head {stand.head} back by {-moved} batches, to {first}")
            taken += max(0, moved)
            reached[place] = first
        trained = _trained(stand, before, size, per_step)
        if trained is not None and _keeps(stand, before, now, owners):
            _compare(found, stand, taken, trained)
        elif trained is not None:
            loose += taken - trained
        owners |= dict.fromkeys(now, stand.head)
        last[stand.head] = stand
    _check_end(found, last, loose)


def _keeps(stand: Stand, before: Stand | None, now: Mapping[int, int], owners: Mapping[int, int]) -> bool:
    """Whether the head has exactly the classes that it had, so that it alone has moved them."""
    if before is None:  # its first merge: whether the classes are those of the start
        return not owners.keys() & now.keys() and len(stand.lanes) == 1 and min(now) == stand.head
    return len(now) == sum(owner == stand.head for owner in owners.values()) and all(owners.get(c) == stand.head for c in now)


def _compare(found: Audit, stand: Stand, taken: int, trained: int) -> None:
    where = f"version {stand.version} moves head {stand.head} by {taken} batches, but its contribution trained {trained}"
    if taken > trained:
        found.lost += taken - trained
        found.problems.append(f"{where}: {taken - trained} are in no merge (lost, or refused as poison)")
    elif taken < trained:
        found.doubled += trained - taken
        found.problems.append(f"{where}: {trained - taken} were merged before")


def _check_end(found: Audit, last: Mapping[int, Stand], loose: int) -> None:
    lanes = [lane for stand in last.values() for lane in stand.lanes]
    if not disjoint(lanes):
        found.problems.append("two heads own the same batches at the end")
    elif density(lanes) == 1 and loose:  # whatever changed hands has been merged by its new owner
        found.lost, found.doubled = found.lost + max(0, loose), found.doubled + max(0, -loose)
        what = "are in no merge" if loose > 0 else "were merged twice"
        found.problems.append(f"of the batches whose lanes went from head to head {abs(loose)} {what}")


def _trained(stand: Stand, before: Stand | None, size: int | None, per_step: int) -> int | None:
    """Batches of the head that were merged since `before`; None if the rows don't say."""
    if size is not None:  # samples are counted through versions that are in no row, too
        return (stand.samples - (before.samples if before else 0)) // size
    follows = stand.sequence == (before.sequence if before else 0) + 1
    return stand.steps * per_step if follows else None


def _samples_of_a_batch(flat: Sequence[Stand]) -> int | None:
    """Samples of one batch; None where batches differ."""
    sizes: Counter[int] = Counter()
    last: dict[int, Stand] = {}
    for stand in flat:
        before = last.get(stand.head)
        batches = stand.batches - (before.batches if before else 0)
        samples = stand.samples - (before.samples if before else 0)
        if batches > 0 and samples > 0:
            sizes[samples // batches if samples % batches == 0 else 0] += 1
        last[stand.head] = stand
    size, count = sizes.most_common(1)[0] if sizes else (0, 0)
    return size if size and count >= NEARLY_ALL * sizes.total() else None


def _batches_of_a_step(flat: Sequence[Stand]) -> int:
    """Batches of one local step (--accumulate), by most contributions that follow the head's last one in the rows."""
    counts: Counter[int] = Counter()
    last: dict[int, Stand] = {}
    for stand in flat:
        before = last.get(stand.head)
        batches = stand.batches - (before.batches if before else 0)
        if stand.steps > 0 and batches > 0 and batches % stand.steps == 0:
            counts[batches // stand.steps] += 1
        last[stand.head] = stand
    return counts.most_common(1)[0][0] if counts else 1


def _classes(lanes: Lanes, modulus: int) -> dict[int, int]:
    """By class, the first batch that is in the lanes."""
    starts = (first + i * stride for first, stride in lanes for i in range(modulus // stride))
    return {start % modulus: start for start in starts}
