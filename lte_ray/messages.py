"""What crosses a process: frozen records of numbers, with references to tensors but never tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    buffer: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Verdict:
    """What became of one contribution: merged into `version`, or refused with a `reason`; `discarded` by the policy."""

    head: int
    sequence: int
    accepted: bool
    version: int
    reason: str = ""
    discarded: bool = False


@dataclass(frozen=True)
class Order:
    """What a head is to do: take `steps` local steps until its next contribution, and `limit` in all, counted from the start.

    Where heads share their steps, more may be granted unless the limit is `final`; the head's learning-rate schedule
    then advances by `rate` a step, and at least to `progress`, the share of all heads' steps that are done.
    """

    steps: int
    limit: int
    final: bool = True
    rate: float = 1.0
    progress: float = 0.0


@dataclass(frozen=True)
class Merged:
    """One merge, as heads redo it from factors: each contribution's weight, in order, and its buffers, one for each group."""

    version: int
    weights: dict[int, float]
    buffers: dict[int, tuple[Any, ...]] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Update:
    """The coordinator's answer to a head: the verdict on its contribution, and what leads to the newest base.

    Attributes:
        verdict: on the contribution that is answered; None if none is.
        version: the newest.
        base: by group, its part of that version's base; for groups that aren't here, `chain` says what to redo.
        chain: the merges since the version that the head's process has.
        references: the factors that `version` holds of each head, where the whole base is sent.
        accepted: the newest sequence number of each head of the asking process that `version` holds.
        checkpoint: whether the head writes its state into this version's checkpoint right after it has rebased.
        orders: what each of these heads is to do next.
        checksum: of the groups that travel by factors, at a version.
    """

    verdict: Verdict | None
    version: int
    base: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    chain: tuple[Merged, ...] = ()
    references: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)
    accepted: dict[int, int] = field(default_factory=dict)
    checkpoint: bool = False
    orders: dict[int, Order] = field(default_factory=dict)
    checksum: tuple[int, int] | None = None


@dataclass(frozen=True)
class MergeRecord:
    """One merge, as the coordinator saw it. Times in seconds, `at` in Unix time.

    `step` is the furthest of the merged heads', `taken` the local steps of all heads that contributions have told of.
    By head: `weights` are those of the contributions (empty where the policy made the change itself), `lags` the versions that
    they were behind, `head_steps` the local steps that they hold, `stalls` the seconds for which merging kept heads from
    training since their contributions before.
    `bytes_up` and `bytes_down` are what these contributions cost until all heads have them; `bytes_instead` is what other ways
    would have sent in their place (`engine.downlink.bytes_instead`).
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
    `resyncs` is how often its process's copy of the base had drifted and was fetched anew; `note` says what is unusual.
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
    note: str = ""
