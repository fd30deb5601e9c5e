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
    over the layers.
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
    buffer: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Verdict:
    """What became of one contribution: merged into `version`, or refused with a `reason`."""

    head: int
    sequence: int
    accepted: bool
    version: int
    reason: str = ""


@dataclass(frozen=True)
class Update:
    """The coordinator's answer to a contribution: the verdict, and the newest base to rebase onto.

    `base` refers to a flat buffer in the plan's base layout. Where `checkpoint` is true, the head writes its state
    into this version's checkpoint right after it has rebased.
    """

    verdict: Verdict
    version: int
    base: Any = field(default=None, repr=False, compare=False)
    checkpoint: bool = False


@dataclass(frozen=True)
class MergeRecord:
    """One merge, as the coordinator saw it. Times in seconds, `at` in Unix time."""

    version: int
    at: float
    heads: tuple[int, ...]
    steps: int
    samples: int
    losses: dict[int, float]
    merge_seconds: float
    bytes_up: int
    bytes_down: int
    step: int
    base_error: float = 0.0
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


@dataclass(frozen=True)
class HeadStatus:
    """A head's progress: answered at any time, also in the middle of a step."""

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
