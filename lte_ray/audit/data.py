"""Whether each batch of the data is in exactly one merge.

Each merge says which lanes of the data order (`data.lanes`) its heads go on with. All strides divide M, their least common
multiple, so the order is M progressions (classes) r, r + M, r + 2M, ..., of which a lane (n, s) is M/s. The audit follows for
each class how far it is merged. A merge must move its head's classes by as many batches as the contribution trained:

    more than it trained:   some are in no merge (lost)
    fewer:                  some are in two (doubled)

Where classes go from head to head, a merge alone doesn't say who trained which: there the sums are compared, whenever
all classes have been merged by the heads that have them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lte_ray.audit.found import Audit
from lte_ray.audit.rows import Stand
from lte_ray.data.lanes import Lanes

MOST_CLASSES = 2**20
"""Of more, the batches aren't followed."""


def check_data(found: Audit, flat: Sequence[Stand], gone: Mapping[int, int]) -> None:
    """Follows the batches through these contributions, in the order of their merges, and adds what is wrong to `found`.

    Args:
        found: the result so far.
        flat: what the merges say of their heads.
        gone: heads that were dropped, and the version after which; others have their lanes.
    """
    strides = {lane.stride for stand in flat for lane in stand.lanes}
    modulus = math.lcm(*strides)
    if flat and (modulus > MOST_CLASSES or not strides):
        why = f"their strides {sorted(strides)[:8]} have no small common multiple" if strides else "no row says whose which are"
        found.problems.append(f"the batches of the data can't be followed: {why}")
        return
    sizes = _Sizes.of(flat)
    reached: dict[int, int] = {}  # by class, the first batch that isn't merged
    owners: dict[int, int] = {}  # by class, the head that moved it last
    owned: dict[int, set[int]] = {}  # by head, the classes that its last merge left it
    last: dict[int, Stand] = {}
    balance, settled = 0, 0  # batches by which classes were moved, less those that were trained; what of it was reported
    for stand in flat:
        now, head = _classes(stand.lanes, modulus), stand.head
        taken = 0
        for place, first in now.items():
            moved = (first - reached.get(place, place)) // modulus
            if moved < 0:
                found.doubled -= moved
                found.problems.append(f"version {stand.version} takes head {head} back by {-moved} batches, to {first}")
            taken += max(0, moved)
            reached[place] = first
        strangers = {owners[place] for place in owned.get(head, set()) & now.keys()} - {head}
        if strangers:
            found.problems.append(f"version {stand.version}: heads {head} and {min(strangers)} own the same batches")
        owners |= dict.fromkeys(now, head)
        trained = sizes.trained(stand, last.get(head))
        balance += 0 if trained is None else taken - trained
        owned[head], last[head] = set(now), stand
        for dropped in [d for d, version in gone.items() if version < stand.version]:
            owned.pop(dropped, None)
        if balance != settled and _resolved(owners, owned, modulus):
            _tell(found, stand, balance - settled)
            settled = balance


def _resolved(owners: Mapping[int, int], owned: Mapping[int, set[int]], modulus: int) -> bool:
    """Whether all classes were merged by the heads that have them now, so that the sums must agree."""
    return len(owners) == modulus and all(place in owned.get(head, ()) for place, head in owners.items())


def _tell(found: Audit, stand: Stand, more: int) -> None:
    """The merges moved the data on by so many batches more than were trained."""
    found.lost, found.doubled = found.lost + max(0, more), found.doubled + max(0, -more)
    what = f"{more} batches more than were trained: they are in no merge (lost, or refused as poison)"
    if more < 0:
        what = f"{-more} batches fewer than were trained: these were merged before"
    found.problems.append(f"the data moved on up to version {stand.version}, the merge of head {stand.head}, by {what}")


@dataclass(frozen=True)
class _Sizes:
    """What a local step takes: `batches` (--accumulate), and `samples` of each batch where all have equally many."""

    batches: int
    samples: int | None
    versions: Sequence[int]

    @classmethod
    def of(cls, flat: Sequence[Stand]) -> _Sizes:
        """By most contributions that follow their head's last one in the rows."""
        made = cls(1, None, sorted({stand.version for stand in flat}))
        last: dict[int, Stand] = {}
        known: list[tuple[int, int, int]] = []  # steps, batches, samples
        for stand in flat:
            before = last.get(stand.head)
            batches = stand.batches - (before.batches if before else 0)
            if made.follows(stand, before) and stand.steps > 0 and batches > 0:
                known.append((stand.steps, batches, stand.samples - (before.samples if before else 0)))
            last[stand.head] = stand
        counts = Counter(batches // steps for steps, batches, _ in known if batches % steps == 0)
        usual = counts.most_common(1)[0][0] if counts else 1
        sizes = {samples / batches for steps, batches, samples in known if batches == steps * usual}
        size = int(sizes.pop()) if len(sizes) == 1 else None
        return cls(usual, size, made.versions)

    def follows(self, stand: Stand, before: Stand | None) -> bool:
        """Whether the rows hold every version between two merges of a head."""
        first, last = before.version if before else 0, stand.version
        return bisect_left(self.versions, last) - bisect_left(self.versions, first + 1) == last - first - 1

    def trained(self, stand: Stand, before: Stand | None) -> int | None:
        """Batches of the head that were merged since `before`; None if the rows don't say."""
        if self.follows(stand, before):
            return stand.steps * self.batches
        # samples are counted through versions that are in no row, too
        return None if not self.samples else (stand.samples - (before.samples if before else 0)) // self.samples


def _classes(lanes: Lanes, modulus: int) -> dict[int, int]:
    """By class, the first batch that is in the lanes."""
    starts = (first + i * stride for first, stride in lanes for i in range(modulus // stride))
    return {start % modulus: start for start in starts}
