"""Whether each batch of the data is in exactly one merge.

Each merge says which lanes of the data order (`data.lanes`) its heads go on with. All strides divide M, their least common
multiple, so the order is M progressions (classes) r, r + M, r + 2M, ..., of which a lane (n, s) is M/s. The audit follows for
each class how far it is merged. A merge must move its head's classes by as many batches as the contribution trained:

    more than it trained:   some are in no merge (lost)
    fewer:                  some are in two (doubled)

Where classes go from head to head, a merge alone doesn't say who trained which: there the sums are compared, whenever
all classes have been merged by the heads that have them.

What was left out on purpose is told by an event, and must show in the numbers; what they don't bear out is lost:

    refused as poison:  the head's next merge counts steps that its contribution doesn't hold (dropped)
    rolled back:        until each class was merged again, the lanes move by as many more batches, at most, as the event says
                        (skipped)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lte_ray.audit.reader import Audit, Happening, LostHead, Refused, Resumed, Rollback, Stand
from lte_ray.data.partition import Partitions

MOST_CLASSES = 2**20
"""Of more, the batches aren't followed."""


def check_data(found: Audit, history: Sequence[Happening]) -> None:
    """Follows the batches through a run, in the order of its rows, and adds what is wrong to `found`."""
    flat = [each for each in history if isinstance(each, Stand)]
    strides = {lane.stride for stand in flat for lane in stand.lanes}
    modulus = math.lcm(*strides)
    if flat and (modulus > MOST_CLASSES or not strides):
        why = f"their strides {sorted(strides)[:8]} have no small common multiple" if strides else "no row says whose which are"
        found.problems.append(f"the batches of the data can't be followed: {why}")
        return
    found.batches = 0
    walk = _Walk(found, modulus, _Sizes.of(history))
    for each in history:
        match each:
            case Stand():
                walk.merged(each)
            case LostHead():
                walk.gone(each)
            case Resumed():
                walk.resumed(each)
            case Refused():
                walk.refused[each.head].append(each.sequence)
            case Rollback():
                walk.allowance.back(each)


class _Allowance:
    """Batches that may be in no merge since the run went back, until each class was merged again."""

    def __init__(self, modulus: int) -> None:
        self._modulus = modulus
        self._left: dict[int, int] = {}  # by the version that the run went back to
        self._since: set[int] = set()  # classes that were merged since

    def back(self, back: Rollback) -> None:
        """The run went back; what it skipped earlier, after that version, is among what it skips now."""
        self._left = {version: left for version, left in self._left.items() if version < back.version}
        self._left[back.version] = max(0, back.skipped)
        self._since = set()

    def spend(self, wanted: int) -> int:
        """So many of these batches, at most, as were skipped."""
        spent = 0
        for version, left in sorted(self._left.items(), reverse=True):
            now = max(0, min(left, wanted - spent))
            self._left[version], spent = left - now, spent + now
        return spent

    def merged(self, classes: Mapping[int, int]) -> None:
        """These were merged."""
        if self._left:
            self._since |= classes.keys()

    def end(self) -> None:
        """The sums were compared: if all classes were merged since, what is left was never skipped."""
        if len(self._since) == self._modulus:
            self._left = {}


class _Walk:
    """Where the data are, by class and by head, while the rows are read."""

    def __init__(self, found: Audit, modulus: int, sizes: _Sizes) -> None:
        self._found, self._modulus, self._sizes = found, modulus, sizes
        self._reached: dict[int, int] = {}  # by class, the first batch that isn't merged
        self._owners: dict[int, int] = {}  # by class, the head that moved it last
        self._owned: dict[int, set[int]] = {}  # by head, the classes that its last merge left it
        self._last: dict[int, Stand] = {}
        self._gone: set[int] = set()
        self._balance = self._settled = 0  # batches by which classes were moved, less those that are known; what of it was told
        self.refused: defaultdict[int, list[int]] = defaultdict(list)  # by head, contributions refused as poison
        self.allowance = _Allowance(modulus)

    def gone(self, gone: LostHead) -> None:
        """Heads have left; who comes under their numbers is another."""
        for head in gone.heads:
            self._owned.pop(head, None)
            self.refused.pop(head, None)
            self._gone.add(head)

    def resumed(self, resumed: Resumed) -> None:
        """Heads begin anew, with data that were others' until then."""
        for head in resumed.anew:
            self._owned.pop(head, None)
            self._last.pop(head, None)
            self.refused.pop(head, None)
            self._gone.discard(head)

    def merged(self, stand: Stand) -> None:
        """A version holds another contribution of a head."""
        found, head, before = self._found, stand.head, self._before(stand)
        now, taken = _classes(stand.lanes, self._modulus), 0
        for place, first in now.items():
            moved = (first - self._reached.get(place, place)) // self._modulus
            if moved < 0:
                found.doubled -= moved
                found.problems.append(f"version {stand.version} takes head {head} back by {-moved} batches, to {first}")
            taken += max(0, moved)
            self._reached[place] = first
        strangers = {self._owners[place] for place in self._owned.get(head, set()) & now.keys()} - {head}
        if strangers:
            found.problems.append(f"version {stand.version}: heads {head} and {min(strangers)} own the same batches")
        self._owners |= dict.fromkeys(now, head)
        trained = self._sizes.trained(stand, before)
        dropped = self._dropped(stand, before, trained)
        found.batches += stand.batches - (before.batches if before else 0) if trained is None else trained
        found.dropped += dropped
        self._balance += 0 if trained is None else taken - trained - dropped
        self._owned[head], self._last[head] = set(now), stand
        self.allowance.merged(now)
        self._settle(stand)

    def _before(self, stand: Stand) -> Stand | None:
        """The merge of the same head before this one."""
        before = self._last.get(stand.head)
        if before is not None and stand.head in self._gone and stand.incarnation > before.incarnation:
            self._gone.discard(stand.head)
            return None  # it came anew
        return before

    def _dropped(self, stand: Stand, before: Stand | None, trained: int | None) -> int:
        """Batches that the head has trained since its merge before, and that a refusal since then has kept out of this one."""
        same = before is not None and before.incarnation == stand.incarnation
        since, refused = before.sequence if before is not None and same else 0, self.refused[stand.head]
        self.refused[stand.head] = [number for number in refused if number > stand.sequence]
        if trained is None or not any(since < number < stand.sequence for number in refused):
            return 0
        batches = stand.batches - (before.batches if before else 0)
        steps = stand.step - (before.step if before else 0)
        return max(0, min(batches, steps * self._sizes.batches) - trained)

    def _settle(self, stand: Stand) -> None:
        """Compares the sums, if all classes were merged by the heads that have them now."""
        owners, owned = self._owners, self._owned
        if len(owners) < self._modulus or any(place not in owned.get(head, ()) for place, head in owners.items()):
            return
        more, found = self._balance - self._settled, self._found
        self._settled = self._balance
        skipped = self.allowance.spend(more)
        self.allowance.end()
        found.skipped += skipped
        if more > skipped:
            found.lost += more - skipped
            what = f"{more - skipped} batches more than were trained: they are in no merge"
        elif more < 0:
            found.doubled -= more
            what = f"{-more} batches fewer than were trained: these were merged before"
        else:
            return
        found.problems.append(f"the data moved on up to version {stand.version}, the merge of head {stand.head}, by {what}")


@dataclass(frozen=True)
class _Sizes:
    """What a local step takes: `batches` (--accumulate), and `samples` of each batch where all have equally many."""

    batches: int
    samples: int | None
    versions: Sequence[int]

    @classmethod
    def of(cls, history: Sequence[Happening]) -> _Sizes:
        """By most contributions that follow their head's last one in the rows, without anything that was left out between."""
        flat = [each for each in history if isinstance(each, Stand)]
        made = cls(1, None, sorted({stand.version for stand in flat}))
        last: dict[int, Stand] = {}
        skipped: set[int] = set()  # heads whose next merge shows what was skipped, too
        known: list[tuple[int, int, int]] = []  # steps, batches, samples
        for each in history:
            if isinstance(each, Rollback):
                skipped = {stand.head for stand in flat}
            if not isinstance(each, Stand):
                continue
            before = last.get(each.head)
            batches = each.batches - (before.batches if before else 0)
            whole = each.step - (before.step if before else 0) == each.steps and each.head not in skipped
            if whole and made.follows(each, before) and each.steps and batches > 0:
                known.append((each.steps, batches, each.samples - (before.samples if before else 0)))
            last[each.head] = each
            skipped.discard(each.head)
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
        if stand.steps is not None and self.follows(stand, before):
            return stand.steps * self.batches
        # samples are counted through versions that are in no row, too
        return None if not self.samples else (stand.samples - (before.samples if before else 0)) // self.samples


def _classes(lanes: Partitions, modulus: int) -> dict[int, int]:
    """By class, the first batch that is in the lanes."""
    starts = (first + i * stride for first, stride in lanes for i in range(modulus // stride))
    return {start % modulus: start for start in starts}
