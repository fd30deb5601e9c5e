"""Checks that each batch of the data is in exactly one merge.

Each merge says with which partitions of the data order (`data.partition`) its heads continue. All strides divide M, their least
common multiple, so the order consists of M progressions (classes) r, r + M, r + 2M, ...; a partition (start n, stride s) has
M/s of them. The audit tracks for each class how far it has been merged. A merge must advance its head's classes by as many
batches as the contribution trained:

    more than it trained:   some are in no merge (lost)
    fewer:                  some are in two merges (doubled)

Where classes move from one head to another, a single merge doesn't tell which head trained them. The sums are compared there,
whenever all classes have been merged by the heads that have them.

Batches that are left out on purpose are announced by an event and must show in the numbers. Those that the numbers don't
confirm are lost:

    refused as harmful: the head's next merge counts steps that its contribution doesn't hold (dropped)
    rolled back:        until each class has been merged again, the partitions advance by additional batches, at most as many as
                        the event says (skipped)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lte_ray.audit.reader import Audit, AuditEvent, HeadPosition, LostHeads, Refused, Resumed, Rollback
from lte_ray.data.partition import Partitions

MAX_CLASSES = 2**20
"""With more classes the batches aren't tracked."""


def check_data(result: Audit, history: Sequence[AuditEvent]) -> None:
    """Tracks the batches through a run, in the order of its rows, and adds what is wrong to `result`."""
    positions = [event for event in history if isinstance(event, HeadPosition)]
    strides = {partition.stride for position in positions for partition in position.partitions}
    modulus = math.lcm(*strides)
    if positions and (modulus > MAX_CLASSES or not strides):
        why = f"their strides {sorted(strides)[:8]} have no small common multiple" if strides else "no row says whose which are"
        result.problems.append(f"the batches of the data can't be followed: {why}")
        return
    result.batches = 0
    tracker = _BatchTracker(result, modulus, _StepSizes.infer(history))
    for event in history:
        match event:
            case HeadPosition():
                tracker.advance(event)
            case LostHeads():
                tracker.remove_heads(event)
            case Resumed():
                tracker.resume(event)
            case Refused():
                tracker.refused[event.head].append(event.sequence)
            case Rollback():
                tracker.allowance.roll_back(event)


class _SkipAllowance:
    """Batches that may be in no merge since a rollback, until each class has been merged again."""

    def __init__(self, modulus: int) -> None:
        self._modulus = modulus
        self._remaining: dict[int, int] = {}  # by the version that the run went back to
        self._merged_since: set[int] = set()  # classes

    def roll_back(self, rollback: Rollback) -> None:
        """Adds the batches of a rollback. They include those of earlier rollbacks to the same or a later version."""
        earlier = {version: count for version, count in self._remaining.items() if version < rollback.version}
        self._remaining = {**earlier, rollback.version: max(0, rollback.skipped)}
        self._merged_since = set()

    def spend(self, wanted: int) -> int:
        """Uses up to `wanted` of these batches, and returns how many."""
        spent = 0
        for version, count in sorted(self._remaining.items(), reverse=True):
            now = max(0, min(count, wanted - spent))
            self._remaining[version], spent = count - now, spent + now
        return spent

    def add_merged(self, classes: Mapping[int, int]) -> None:
        """Records which classes a merge advanced."""
        if self._remaining:
            self._merged_since |= classes.keys()

    def close_if_complete(self) -> None:
        """Ends the allowance, once the sums were compared, if all classes have been merged: the rest was never skipped."""
        if len(self._merged_since) == self._modulus:
            self._remaining = {}


class _BatchTracker:
    """How far each class has been merged, and by which head, while the rows are read."""

    def __init__(self, result: Audit, modulus: int, sizes: _StepSizes) -> None:
        self._result, self._modulus, self._sizes = result, modulus, sizes
        self._next_batch: dict[int, int] = {}  # by class, the first batch that isn't merged
        self._owners: dict[int, int] = {}  # by class, the head that advanced it last
        self._classes: dict[int, set[int]] = {}  # by head, the classes that it has after its last merge
        self._last: dict[int, HeadPosition] = {}
        self._removed: set[int] = set()
        self._balance = 0  # batches by which classes were advanced, less those that are accounted for
        self._reported = 0  # the part of the balance that is in the result
        self.refused: defaultdict[int, list[int]] = defaultdict(list)  # by head, contributions refused as harmful
        self.allowance = _SkipAllowance(modulus)

    def remove_heads(self, lost: LostHeads) -> None:
        """Heads have left. A later head of the same number is another one."""
        for head in lost.heads:
            self._classes.pop(head, None)
            self.refused.pop(head, None)
            self._removed.add(head)

    def resume(self, resumed: Resumed) -> None:
        """Heads start again, with data that belonged to others until then."""
        for head in resumed.anew:
            self._classes.pop(head, None)
            self._last.pop(head, None)
            self.refused.pop(head, None)
            self._removed.discard(head)

    def advance(self, position: HeadPosition) -> None:
        """A version holds another contribution of a head."""
        result, head, before = self._result, position.head, self._previous(position)
        starts, advanced = _class_starts(position.partitions, self._modulus), 0
        for index, first in starts.items():
            moved = (first - self._next_batch.get(index, index)) // self._modulus
            if moved < 0:
                result.doubled -= moved
                result.problems.append(f"version {position.version} takes head {head} back by {-moved} batches, to {first}")
            advanced += max(0, moved)
            self._next_batch[index] = first
        other_owners = {self._owners[index] for index in self._classes.get(head, set()) & starts.keys()} - {head}
        if other_owners:
            result.problems.append(f"version {position.version}: heads {head} and {min(other_owners)} own the same batches")
        self._owners |= dict.fromkeys(starts, head)
        trained = self._sizes.trained_batches(position, before)
        dropped = self._dropped_batches(position, before, trained)
        result.batches += position.batches - (before.batches if before else 0) if trained is None else trained
        result.dropped += dropped
        self._balance += 0 if trained is None else advanced - trained - dropped
        self._classes[head], self._last[head] = set(starts), position
        self.allowance.add_merged(starts)
        self._compare_sums(position)

    def _previous(self, position: HeadPosition) -> HeadPosition | None:
        """The position of the same head before this one."""
        before = self._last.get(position.head)
        if before is not None and position.head in self._removed and position.incarnation > before.incarnation:
            self._removed.discard(position.head)
            return None  # another head has its number
        return before

    def _dropped_batches(self, position: HeadPosition, before: HeadPosition | None, trained: int | None) -> int:
        """Batches that the head has trained since its last merge and that a refusal since then has kept out of this one."""
        same_process = before is not None and before.incarnation == position.incarnation
        since, refused = before.sequence if before is not None and same_process else 0, self.refused[position.head]
        self.refused[position.head] = [number for number in refused if number > position.sequence]
        if trained is None or not any(since < number < position.sequence for number in refused):
            return 0
        batches = position.batches - (before.batches if before else 0)
        steps = position.step - (before.step if before else 0)
        return max(0, min(batches, steps * self._sizes.batches) - trained)

    def _compare_sums(self, position: HeadPosition) -> None:
        """Reports lost and doubled batches, if all classes have been merged by the heads that have them."""
        owners, classes = self._owners, self._classes
        if len(owners) < self._modulus or any(index not in classes.get(head, ()) for index, head in owners.items()):
            return
        more, result = self._balance - self._reported, self._result
        self._reported = self._balance
        skipped = self.allowance.spend(more)
        self.allowance.close_if_complete()
        result.skipped += skipped
        if more > skipped:
            result.lost += more - skipped
            what = f"{more - skipped} batches more than were trained: they are in no merge"
        elif more < 0:
            result.doubled -= more
            what = f"{-more} batches fewer than were trained: these were merged before"
        else:
            return
        result.problems.append(
            f"the data moved on up to version {position.version}, the merge of head {position.head}, by {what}"
        )


@dataclass(frozen=True)
class _StepSizes:
    """What a local step takes: `batches` (--accumulate), and `samples` of each batch if all have equally many."""

    batches: int
    samples: int | None
    versions: Sequence[int]

    @classmethod
    def infer(cls, history: Sequence[AuditEvent]) -> _StepSizes:
        """Infers the sizes from contributions that directly follow their head's previous one in the rows."""
        positions = [event for event in history if isinstance(event, HeadPosition)]
        sizes = cls(1, None, sorted({position.version for position in positions}))
        last: dict[int, HeadPosition] = {}
        after_rollback: set[int] = set()  # heads whose next merge also shows what was skipped
        samples: list[tuple[int, int, int]] = []  # steps, batches, samples
        for event in history:
            if isinstance(event, Rollback):
                after_rollback = {position.head for position in positions}
            if not isinstance(event, HeadPosition):
                continue
            before = last.get(event.head)
            batches = event.batches - (before.batches if before else 0)
            complete = event.step - (before.step if before else 0) == event.steps and event.head not in after_rollback
            if complete and sizes.has_all_versions(event, before) and event.steps and batches > 0:
                samples.append((event.steps, batches, event.samples - (before.samples if before else 0)))
            last[event.head] = event
            after_rollback.discard(event.head)
        counts = Counter(batches // steps for steps, batches, _ in samples if batches % steps == 0)
        usual = counts.most_common(1)[0][0] if counts else 1
        per_batch = {count / batches for steps, batches, count in samples if batches == steps * usual}
        return cls(usual, int(per_batch.pop()) if len(per_batch) == 1 else None, sizes.versions)

    def has_all_versions(self, position: HeadPosition, before: HeadPosition | None) -> bool:
        """Whether the rows hold every version between two merges of a head."""
        first, last = before.version if before else 0, position.version
        return bisect_left(self.versions, last) - bisect_left(self.versions, first + 1) == last - first - 1

    def trained_batches(self, position: HeadPosition, before: HeadPosition | None) -> int | None:
        """Batches of the head that were merged since `before`, or None if the rows don't tell."""
        if position.steps is not None and self.has_all_versions(position, before):
            return position.steps * self.batches
        # The samples also count versions that are in no row.
        return None if not self.samples else (position.samples - (before.samples if before else 0)) // self.samples


def _class_starts(partitions: Partitions, modulus: int) -> dict[int, int]:
    """By class, the first batch that is in the partitions."""
    starts = (first + i * stride for first, stride in partitions for i in range(modulus // stride))
    return {start % modulus: start for start in starts}
