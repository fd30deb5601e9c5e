"""A trial: one training of a sweep. What it varies, and what it gave."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.config.sweep import Values
from lte_ray.ladder import Point


@dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    Attributes:
        number: of its configuration, from 0.
        values: the configuration: flags without dashes, and what is written after each.
        seed: of data, weights and A.
        name: of its run, a folder in the sweep's.
    """

    number: int
    values: Values
    seed: int
    name: str

    @classmethod
    def make(cls, number: int, values: Values, seed: int, first: bool = True) -> Trial:
        """Returns a trial. Of the first seed its name has no seed."""
        return cls(number, values, seed, f"trial-{number:03d}" if first else f"trial-{number:03d}-seed-{seed}")

    @property
    def label(self) -> str:
        """The configuration in words: ``lora-r=8 lr=0.01``."""
        return describe(dict(self.values))

    @property
    def key(self) -> str:
        """Identifies its result."""
        return hashlib.sha256(json.dumps([self.values, self.seed]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TrialSettings:
    """What a trial trains: the worker and all settings of a run. `storage` is that of the sweep."""

    worker: Any
    lte: LTEConfig
    merge: MergeConfig
    train: TrainConfig
    placement: PlacementConfig
    failure: FailureConfig
    storage: StorageConfig


@dataclass(frozen=True)
class TrialResult:
    """What a trial gave.

    Attributes:
        key: of the trial.
        name, number, values, seed: of the trial, for readers.
        points: evaluations in order; the last is at the end.
        seconds: that it took since it was started last.
        sent: bytes that all heads together sent and received.
        stopped: why it ended before its last step, although nothing failed; empty if it didn't.
        failed: why it failed; empty if it didn't.
    """

    key: str
    name: str
    number: int
    values: Mapping[str, str]
    seed: int
    points: tuple[Point, ...]
    seconds: float
    sent: int = 0
    stopped: str = ""
    failed: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end."""
        return not self.stopped and not self.failed

    @property
    def samples(self) -> int:
        """Samples that all heads together had trained at the last evaluation."""
        return self.points[-1].samples if self.points else 0

    def last(self, figure: str) -> float:
        """A figure at the last evaluation; NaN without one."""
        return self.points[-1].figures.get(figure, math.nan) if self.points else math.nan


def describe(values: Mapping[str, str]) -> str:
    """Returns a configuration in words."""
    return " ".join(f"{flag}={value}" for flag, value in values.items())
