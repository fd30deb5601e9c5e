"""What crosses a process: frozen records of numbers, with references to tensors but never tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

CHECKSUM_INTERVAL = 10
"""Versions between two checksums of the groups that heads redo from factors."""

PartitionPairs = tuple[tuple[int, int], ...]
"""Parts of the data order: each the batches `next`, `next` + `stride`, ... (`data.partition`)."""


@dataclass(frozen=True)
class Assignment:
    """Partitions that a head receives, or gives away. Repeats of one `id` change nothing."""

    id: int
    partitions: PartitionPairs


@dataclass(frozen=True)
class CommittedPosition:
    """Where one head is in its data and its steps.

    It is committed if the coordinator holds it: the base contains what the head trained up to here, and none of its batches
    after that. Heads also keep positions that aren't committed: where they are now, and where their last contribution left
    them. Checkpoints and logs use these field names.

    Attributes:
        incarnation, sequence: of the head's last contribution up to here.
        version: if the position is committed, the version that this contribution was merged into, at most the base's; if
            nothing of the head is merged yet, the version at which it joined. If a head recorded the position itself, the
            version that it had adopted there; 0 where it has restored `HeadState.contributed`, whose version isn't saved.
        step, samples: what the head had trained in all.
        batches: how many it had taken.
        lanes: its partitions after them.
    """

    incarnation: int = 0
    sequence: int = 0
    version: int = 0
    step: int = 0
    samples: int = 0
    batches: int = 0
    lanes: PartitionPairs = ()


@dataclass(frozen=True)
class Measures:
    """What a head has measured of its training since its last contribution.

    Attributes:
        lr: the learning rates by parameter group ("lora", "replica"), after the last step; the highest of groups of one name.
        gradient_norm: of the first step's gradient, before clipping; None if it wasn't measured.
        tokens: that the contribution holds; None if that isn't known.
        flops: operations that its samples took, as the worker says; None if it doesn't.
        peaks: by GPU, its highest operations per second; empty on CPUs, and for GPUs that aren't known.
        gpu_memory: bytes that torch has allocated at most on the head's GPU; None on CPUs.
        memory: bytes of its process's resident memory at most; 0 if unknown. Both are of all heads of the process.
    """

    lr: dict[str, float] = field(default_factory=dict)
    gradient_norm: float | None = None
    tokens: int | None = None
    flops: float | None = None
    peaks: dict[str, float] = field(default_factory=dict)
    gpu_memory: int | None = None
    memory: int = 0


@dataclass(frozen=True)
class Contribution:
    """A head's offer to the coordinator: what it learned since its reference.

    Attributes:
        run: the run's name.
        head: its number.
        incarnation, sequence: count the head's restarts, and its contributions from 1, so that repeats and messages of a dead
            predecessor are told apart.
        version: of the base that the head trained on.
        step: local steps that the head has taken in all.
        steps, samples: what was trained since the head's last accepted contribution.
        loss: mean training loss over those steps.
        figures: means of the worker's own figures over the steps since the head's last contribution, by name.
        measures: of the head.
        base_error: relative error of this head's main weights from quantizing the base of `version`, the largest of the layers.
        seconds: time that the steps since its last contribution took.
        stall: time for which merging kept the head from training meanwhile.
        batches, partitions: the head's data position.
        assignment_id: of the newest assignment that the head has applied; 0 if none.
        revoked: the partitions that the head has given away last.
        checksums: of the buffers as they were sent.
        norm: of the whole change, where the head has computed it.
        buffer: refers to a flat buffer in the plan's contribution layout (factors, then replica changes).
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
    figures: dict[str, float] = field(default_factory=dict)
    measures: Measures = field(default=Measures(), compare=False)
    base_error: float = 0.0
    seconds: float = 0.0
    stall: float = 0.0
    batches: int = 0
    partitions: PartitionPairs = ()
    assignment_id: int = 0
    revoked: Assignment | None = None
    checksums: tuple[int, ...] = ()
    norm: float | None = None
    buffer: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class ContributionResult:
    """The result of one contribution.

    Attributes:
        head, sequence: of the contribution.
        accepted: whether it was merged.
        version: the one that it was merged into, or the newest.
        reason: why it was refused.
        discarded: by the policy; its progress is part of the next contribution.
        harmful: its content would harm the base: the head drops its changes and continues from its last merged contribution.
        quarantined: the head's contributions were refused too often in a row, and it trains no more.
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
    """A checkpoint of `version`, to which heads write their state as of their contribution `sequences[head]`.

    `id` tells checkpoints of one version apart: a head that is asked twice writes once.
    """

    version: int
    sequences: dict[int, int]
    id: int = 0


@dataclass(frozen=True)
class HeadDirective:
    """What a head must do next.

    Attributes:
        steps: local steps until its next contribution.
        limit: local steps in all, counted from the start.
        final: whether that limit won't be raised. Where heads share their steps, more may be granted otherwise.
        rate: by how much the head's learning-rate schedule advances a step, where heads share their steps.
        progress: the share of all heads' steps that are done; the schedule advances at least to it.
        assignments: partitions of data that the head must take over.
        revocation: asks the head to give half of its partitions away, under that number; 0: no.
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

    Attributes:
        position: that.
        reference: refers to its factors there; None where B' = 0.
        checkpoint: one that holds its state, if there is any.
        exact: whether the head takes over all of that state, or only what the base doesn't say (the optimizer's state).
    """

    position: CommittedPosition
    reference: Any = field(default=None, repr=False, compare=False)
    checkpoint: int | None = None
    exact: bool = False


@dataclass(frozen=True)
class StepCoefficients:
    """A linear step of weights W and of the momentum m, by the weighted change D of a merge: first m, then W with the new m.

    m := keep m + add D,  W := W + change D + momentum m. The defaults are a merge without momentum, and leave m as it is.
    """

    keep: float = 1.0
    add: float = 0.0
    change: float = 1.0
    momentum: float = 0.0


@dataclass(frozen=True)
class OuterStep:
    """The step that a merge takes with its change D = sum of weight x change, in place of W := W + D.

    The executors keep the momentum m, as large as the base and 0 at first. Running statistics of BatchNorm layers are always
    averaged: their part of the base moves by D, and their momentum stays 0.

    Attributes:
        factors: for the weights that have factors, and for the matrices that train in full (`Replica.weight`).
        replicas: for all other replica parameters.
    """

    factors: StepCoefficients
    replicas: StepCoefficients

    @property
    def uses_momentum(self) -> bool:
        """Whether the step adds to the momentum."""
        return self.factors.add != 0 or self.replicas.add != 0


@dataclass(frozen=True)
class MergeDelta:
    """One merge, as heads redo it: from factors, or by the change that it made.

    Attributes:
        version: that it leads to.
        weights: by head, in order.
        buffers: each contribution's buffers, one for each group, by head.
        fresh: those of the heads whose factors count from B' = 0, though earlier versions may hold factors of that number.
        outer_step: what the merge does with the sum of its changes; None: it adds the sum to the base.
        changes: by group, the rounded change of its part of the base; of the groups that travel so.
    """

    version: int
    weights: dict[int, float]
    buffers: dict[int, tuple[Any, ...]] = field(repr=False, compare=False)
    fresh: tuple[int, ...] = ()
    outer_step: OuterStep | None = None
    changes: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class CoordinatorReply:
    """The coordinator's reply to a process of heads: the result of a contribution, and what leads to the newest base.

    Attributes:
        result: of the contribution that is answered; None if none is.
        version: the newest.
        base_parts: by group, its part of that version's base; other groups are redone from `deltas`.
        deltas: the merges since the version that the heads' process has.
        references: the factors that `version` holds of each head, where the whole base is sent.
        momentum: by group, its part of that version's momentum, where the whole base is sent and there is momentum; only of
            groups that are redone later.
        positions: what `version` holds of every head.
        assignment_state: which head owns which batches, at `version` (`data.assignment`).
        checkpoint_requests: checkpoints to which these heads must write their states, before they rebase.
        join_replies: where heads that join start.
        directives: what each of these heads must do next.
        checksum: a version, and the checksum of its groups that are redone: of their base and momentum.
    """

    result: ContributionResult | None
    version: int
    base_parts: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    deltas: tuple[MergeDelta, ...] = ()
    references: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    momentum: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    positions: dict[int, CommittedPosition] = field(default_factory=dict)
    assignment_state: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    checkpoint_requests: tuple[CheckpointRequest, ...] = ()
    join_replies: dict[int, JoinReply] = field(default_factory=dict)
    directives: dict[int, HeadDirective] = field(default_factory=dict)
    checksum: tuple[int, int] | None = None

    def includes(self, head: int, sequence: int) -> bool:
        """Whether this contribution is the last of its head's that `version` holds."""
        return head in self.positions and self.positions[head].sequence == sequence


@dataclass(frozen=True)
class HeadReport:
    """What a process knows of one of its heads.

    Attributes:
        step: local steps that it has taken; -1 before it begins.
        limit: up to which step it may go.
        assignment_id, revocation_id: numbers of its newest assignment and revocation.
        factors: those that a base may hold of it, by the number of the contribution that they follow; None where B' = 0.
    """

    step: int
    limit: int
    assignment_id: int = 0
    revocation_id: int = 0
    factors: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class RecoveryReport:
    """What one process of heads knows of the run when the coordinator is lost.

    Attributes:
        version: the newest that it received; -1 if none.
        base: refers to that version's base; None if there is none.
        positions, assignment_state: as in `CoordinatorReply`, at that version.
        heads: of this process, by number.
        momentum: refers to that version's momentum, flat, 0 where the process can't know it: in groups that are sent as the
            base. None if it knows none.
    """

    version: int
    base: Any = field(repr=False, compare=False)
    positions: dict[int, CommittedPosition]
    assignment_state: dict[str, Any] = field(repr=False, compare=False)
    heads: dict[int, HeadReport]
    momentum: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class MergeRecord:
    """One merge, as the coordinator saw it.

    Attributes:
        version: that it led to.
        at: Unix time in seconds.
        heads: the merged ones.
        steps, samples: what their contributions hold, together.
        losses: mean training loss, by head.
        figures: the worker's own, by name and head.
        measures: by head.
        bytes_up, bytes_down: what these contributions cost until all heads have them.
        step: the furthest of the merged heads'.
        steps_taken: local steps of all heads that contributions have reported.
        merge_seconds: that the products took.
        base_error: the largest of the contributions'.
        norms: of their whole changes, by head; empty where heads compute none (`MergeConfig.max_norm_z` is 0).
        alignment: by head, the mean cosine between its change and the others'; empty if it wasn't measured.
        effective_rank: of the mean change, if it was measured.
        weights: of the contributions, by head; empty where the policy made the change itself.
        outer_step: as in `MergeDelta`.
        ema_keep: the share of the moving average of the bases that stayed; None if there is none.
        lags: how many versions they were behind, by head.
        head_steps: the local steps that they hold, by head.
        stalls: seconds for which merging kept a head from training since its contribution before, by head.
        alternative_bytes: what other ways of training would have sent instead (`broadcast_log.alternative_bytes`).
        positions: what the new version holds of the merged heads.
        fresh: those of them whose factors count from B' = 0.
        base, ema: refer to the new base and the moving average, where they are published for evaluation.
        adapters: by head, refers to the factors to evaluate it with, flat, where heads have independent adapters.
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
    steps_taken: int = 0
    figures: dict[str, dict[int, float]] = field(default_factory=dict)
    measures: dict[int, Measures] = field(default_factory=dict)
    merge_seconds: float = 0.0
    base_error: float = 0.0
    norms: dict[int, float] = field(default_factory=dict)
    alignment: Mapping[int, float] = field(default_factory=dict)
    effective_rank: float | None = None
    weights: dict[int, float] = field(default_factory=dict)
    outer_step: OuterStep | None = None
    ema_keep: float | None = None
    lags: dict[int, int] = field(default_factory=dict)
    head_steps: dict[int, int] = field(default_factory=dict)
    stalls: dict[int, float] = field(default_factory=dict)
    alternative_bytes: dict[str, int] = field(default_factory=dict)
    positions: dict[int, CommittedPosition] = field(default_factory=dict)
    fresh: tuple[int, ...] = ()
    base: Any = field(default=None, repr=False, compare=False)
    ema: Any = field(default=None, repr=False, compare=False)
    adapters: Mapping[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def collect_figures(contributions: Iterable[Contribution]) -> dict[str, dict[int, float]]:
        """The worker's figures of these contributions, by name and head. Heads may have figures of other names."""
        by_name: dict[str, dict[int, float]] = {}
        for contribution in contributions:
            for name, value in contribution.figures.items():
                by_name.setdefault(name, {})[contribution.head] = value
        return by_name


@dataclass(frozen=True)
class HeadTimes:
    """How a head has spent its time, in seconds since it began its first step."""

    train: float = 0.0
    publish: float = 0.0
    wait: float = 0.0
    fetch: float = 0.0
    rebase: float = 0.0
    checkpoint: float = 0.0

    @property
    def stalled(self) -> float:
        """Seconds for which merging kept the head from training."""
        return self.publish + self.wait + self.fetch + self.rebase


@dataclass(frozen=True)
class HeadStatus:
    """A head's progress, which it can tell at any time, also in the middle of a step.

    Attributes:
        head: its number.
        step, samples, loss: what it has trained, and its mean training loss.
        version: of its base.
        state: what it is doing.
        device: that it trains on.
        times: how it has spent its time.
        first_step_at, last_step_at: Unix times in seconds.
        untrained: which weights got no gradient in the first round, in words.
        bytes_up: of its contributions.
        bytes_down: what its process fetched for all its heads, in equal parts.
        resyncs: how often its process's copy of the base had drifted and was fetched again.
        refused: how many of its contributions couldn't be merged.
        dropped: the newest of these that were harmful: the coordinator's epoch, and their sequence numbers.
        note: what is unusual.
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
    untrained: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    resyncs: int = 0
    refused: int = 0
    dropped: tuple[tuple[int, int], ...] = ()
    note: str = ""
