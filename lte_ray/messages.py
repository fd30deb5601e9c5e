"""What crosses a process: frozen records of numbers, with references to tensors but never tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHECKSUM_INTERVAL = 10
"""Versions between two checksums of the groups that heads redo from factors."""

Partitions = tuple[tuple[int, int], ...]
"""Parts of the data order: each the batches `next`, `next` + `stride`, ... (`data.partition`)."""


@dataclass(frozen=True)
class Assignment:
    """Lanes that a head is given, or gives away, under a number that makes repeats harmless."""

    id: int
    partitions: Partitions


@dataclass(frozen=True)
class CommittedPosition:
    """What a version of the base holds of one head: where its last merged contribution, made at `version` or before, left it.

    `batches` and `lanes` are the data position: whatever the head trains after it is in no base yet.
    """

    incarnation: int = 0
    sequence: int = 0
    version: int = 0
    step: int = 0
    samples: int = 0
    batches: int = 0
    lanes: Partitions = ()


@dataclass(frozen=True)
class Contribution:
    """A head's offer to the coordinator: what it learned since its reference.

    `buffer` refers to a flat buffer in the plan's contribution layout (factors, then replica changes). `version` is
    the base that the head trained on, `sequence` counts the head's contributions from 1 and `incarnation` its
    restarts, so that repeats and messages from a dead predecessor are told apart. `steps` and `samples` count what
    was trained since the head's last accepted contribution; `loss` is the mean training loss over those steps.
    `base_error` is the relative error that quantising the base of `version` made in this head's main weights, the largest
    over the layers. `seconds` is the time that the steps since its last contribution took, and `stall` the time for which
    merging kept the head from training meanwhile.

    `batches` and `lanes` are the head's data position, `grant` is the newest grant of lanes that it took and `released` what it
    gave away; `checksums` are checksums of the buffers as they were sent, and `norm` is that of the whole change, where the
    head has computed it.
    """

    run: str
    head: int
    incarnation: int
    sequence: int
    version: int
    step: int
    steps: int
    samples: int
    loss: float
    base_error: float = 0.0
    seconds: float = 0.0
    stall: float = 0.0
    batches: int = 0
    partitions: Partitions = ()
    assignment_id: int = 0
    revoked: Assignment | None = None
    checksums: tuple[int, ...] = ()
    norm: float | None = None
    buffer: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class ContributionResult:
    """What became of one contribution: merged into `version`, or refused with a `reason`.

    `discarded` by the policy: what it held rides in the next one. `poison`: the head drops what it held and goes on from its
    last merged contribution. `quarantined`: that happened too often in a row, and the head trains no more.
    """

    head: int
    sequence: int
    accepted: bool
    version: int
    reason: str = ""
    discarded: bool = False
    harmful: bool = False
    quarantined: bool = False


@dataclass(frozen=True)
class CheckpointRequest:
    """A checkpoint of `version`, into which heads write their state as it follows their contribution `sequences[head]`.

    `cut` tells checkpoints of one version apart: a head that is asked twice writes once.
    """

    version: int
    sequences: dict[int, int]
    id: int = 0


@dataclass(frozen=True)
class HeadDirective:
    """What a head is to do: take `steps` local steps until its next contribution, and `limit` in all, counted from the start.

    Where heads share their steps, more may be granted unless the limit is `final`; the head's learning-rate schedule
    then advances by `rate` a step, and at least to `progress`, the share of all heads' steps that are done.
    `grants` are lanes of data that the head is to take over; `release` asks it to give half of its own away, under that number.
    """

    steps: int
    limit: int
    final: bool = True
    rate: float = 1.0
    progress: float = 0.0
    assignments: tuple[Assignment, ...] = ()
    revocation: int = 0


@dataclass(frozen=True)
class JoinReply:
    """Where a head starts: at what the base holds of it.

    `reference` refers to its factors there (None where B' = 0). `saved` is a checkpoint that holds its state: with `exact` all
    of it is taken over, else what the base doesn't say (the optimizer's state).
    """

    position: CommittedPosition
    reference: Any = field(default=None, repr=False, compare=False)
    checkpoint: int | None = None
    exact: bool = False


@dataclass(frozen=True)
class MergeDelta:
    """One merge, as heads redo it from factors: each contribution's weight, in order, and its buffers, one for each group.

    `fresh` are those of its heads whose factors count from B' = 0, whatever earlier versions held of that number.
    """

    version: int
    weights: dict[int, float]
    buffers: dict[int, tuple[Any, ...]] = field(repr=False, compare=False)
    fresh: tuple[int, ...] = ()


@dataclass(frozen=True)
class CoordinatorReply:
    """The coordinator's answer to a head: the verdict on its contribution, and what leads to the newest base.

    Attributes:
        verdict: on the contribution that is answered; None if none is.
        version: the newest.
        base: by group, its part of that version's base; for groups that aren't here, `chain` says what to redo.
        chain: the merges since the version that the head's process has.
        references: the factors that `version` holds of each head, where the whole base is sent.
        held: what `version` holds of every head.
        ledger: whose which batches are, at `version` (`data.assignment`).
        saves: checkpoints into which the asking heads are to write their states, before they rebase.
        begins: of heads that join, where they start.
        orders: what each of these heads is to do next.
        checksum: of the groups that travel by factors, at a version.
    """

    result: ContributionResult | None
    version: int
    base_parts: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    deltas: tuple[MergeDelta, ...] = ()
    references: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    positions: dict[int, CommittedPosition] = field(default_factory=dict)
    assignment_state: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    checkpoint_requests: tuple[CheckpointRequest, ...] = ()
    join_replies: dict[int, JoinReply] = field(default_factory=dict)
    directives: dict[int, HeadDirective] = field(default_factory=dict)
    checksum: tuple[int, int] | None = None

    def includes(self, head: int, sequence: int) -> bool:
        """Whether `version` holds the head's contribution of this number as its last."""
        return head in self.positions and self.positions[head].sequence == sequence


@dataclass(frozen=True)
class HeadReport:
    """Of one head: its step, up to which step it may go, and its newest grant and release.

    `factors` are those that a base may hold of it, by the number of the contribution that they follow: None where B' = 0.
    """

    step: int
    limit: int
    assignment_id: int = 0
    revoked: int = 0
    factors: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class RecoveryReport:
    """What one process of heads knows of the run when the coordinator is lost: the newest version that came to it.

    `base` is None, and `version` -1, where none has come.
    """

    version: int
    base: Any = field(repr=False, compare=False)
    positions: dict[int, CommittedPosition]
    assignment_state: dict[str, Any] = field(repr=False, compare=False)
    heads: dict[int, HeadReport]


@dataclass(frozen=True)
class MergeRecord:
    """One merge, as the coordinator saw it. Times in seconds, `at` in Unix time.

    `step` is the furthest of the merged heads', `taken` the local steps of all heads that contributions have told of.
    By head: `weights` are those of the contributions (empty where the policy made the change itself), `lags` the versions that
    they were behind, `head_steps` the local steps that they hold, `stalls` the seconds for which merging kept heads from
    training since their contributions before, `held` what the new version holds of them.
    `bytes_up` and `bytes_down` are what these contributions cost until all heads have them; `bytes_instead` is what other ways
    would have sent in their place (`engine.downlink.bytes_instead`). `fresh` are those whose factors count from B' = 0.
    """

    version: int
    at: float
    heads: tuple[int, ...]
    steps: int
    samples: int
    losses: dict[int, float]
    bytes_up: int
    bytes_down: int
    step: int
    taken: int = 0
    merge_seconds: float = 0.0
    base_error: float = 0.0
    weights: dict[int, float] = field(default_factory=dict)
    lags: dict[int, int] = field(default_factory=dict)
    head_steps: dict[int, int] = field(default_factory=dict)
    stalls: dict[int, float] = field(default_factory=dict)
    bytes_instead: dict[str, int] = field(default_factory=dict)
    held: dict[int, CommittedPosition] = field(default_factory=dict)
    fresh: tuple[int, ...] = ()
    base: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class HeadTimes:
    """Where a head's time went, in seconds since it began its first step."""

    train: float = 0.0
    publish: float = 0.0
    wait: float = 0.0
    fetch: float = 0.0
    rebase: float = 0.0
    checkpoint: float = 0.0

    @property
    def stalled(self) -> float:
        """For how long merging kept the head from training."""
        return self.publish + self.wait + self.fetch + self.rebase


@dataclass(frozen=True)
class HeadStatus:
    """A head's progress: answered at any time, also in the middle of a step.

    `bytes_up` are those of its contributions; `bytes_down` are what its process fetched for all its heads, in equal parts.
    `refused` counts its contributions that couldn't be merged; `dropped` are the newest that were poison: how many coordinators
    there were before the one that said so, and their sequence numbers. `resyncs` is how often its process's copy of the base
    had drifted and was fetched anew; `note` says what is unusual.
    """

    head: int
    step: int = 0
    samples: int = 0
    loss: float = float("nan")
    version: int = 0
    state: str = "starting"
    device: str = "cpu"
    times: HeadTimes = HeadTimes()
    first_step_at: float | None = None
    last_step_at: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    resyncs: int = 0
    refused: int = 0
    dropped: tuple[tuple[int, int], ...] = ()
    note: str = ""
