"""Why a run ends before its last step without an error: a request, or a limit of its settings."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lte_ray.config import TrainConfig
from lte_ray.config.best_figure import parse_best_by
from lte_ray.config.stopping import TRAIN_LOSS, parse_condition
from lte_ray.errors import ConfigError
from lte_ray.messages import MergeRecord


@dataclass(frozen=True)
class Stop:
    """That a run ends early.

    Attributes:
        kind: "request" (`Run.stop`), or the setting: "max-time", "stop-when" or "patience".
        reason: in words.
    """

    kind: Literal["request", "max-time", "stop-when", "patience"]
    reason: str


class StopRules:
    """Decides whether a run ends early. The first reason counts.

    Args:
        train: has the limits.
        best_by: the figure that `patience` compares, as `StorageConfig.best_by`.
        began: when this process began the run (monotonic).

    Attributes:
        stop: why the run ends early; None while it goes on.
    """

    def __init__(self, train: TrainConfig, best_by: str, began: float) -> None:
        self._train, self._began = train, began
        self._condition = parse_condition(train.stop_when) if train.stop_when else None
        self._best_by, self._sign = parse_best_by(best_by)
        self._best, self._without_improvement = math.inf, 0
        self._losses: dict[int, float] = {}  # each head's newest
        self.stop: Stop | None = None

    def request(self, stop: Stop) -> None:
        """Ends the run for this reason, unless it ends already. Any thread may call it."""
        self.stop = self.stop or stop

    def check_time(self) -> None:
        """Ends the run once it has taken its time."""
        limit = self._train.max_time
        if limit and time.monotonic() - self._began >= limit:
            self.request(Stop("max-time", f"it has run for {limit:g} s (--max-time)"))

    def record_merge(self, record: MergeRecord) -> None:
        """Looks at the training loss after a merge: the mean of the heads' newest."""
        self._losses |= record.losses
        if self._condition is not None and self._condition.name == TRAIN_LOSS and self._losses:
            self._check(sum(self._losses.values()) / len(self._losses))

    def record_evaluation(self, values: Mapping[str, float]) -> None:
        """Looks at an evaluation.

        Raises:
            ConfigError: it lacks the figure that a setting names.
        """
        condition = self._condition
        if condition is not None and condition.name != TRAIN_LOSS:
            if condition.name not in values:
                raise ConfigError(
                    f"--stop-when is {self._train.stop_when!r}, but the evaluation has no {condition.name}. It has "
                    f"{_listed(values)}; {TRAIN_LOSS} is the training loss."
                )
            self._check(values[condition.name])
        if self._train.patience:
            self._count(values)

    def _check(self, value: float) -> None:
        if self._condition is not None and self._condition.holds(value):
            self.request(Stop("stop-when", f"{self._condition.name} is {value:.6g} (--stop-when '{self._train.stop_when}')"))

    def _count(self, values: Mapping[str, float]) -> None:
        """Counts evaluations since the best one; one whose figure is NaN isn't better."""
        self._best_by = self._best_by or next(iter(values), "")
        if self._best_by not in values:
            named = f"--best-by is {self._best_by!r}" if self._best_by else f"--patience is {self._train.patience}"
            raise ConfigError(f"{named}, but the evaluation has no such figure. It has {_listed(values)}.")
        score = self._sign * values[self._best_by]
        if score < self._best:
            self._best, self._without_improvement = score, 0
            return
        self._without_improvement += 1
        if self._without_improvement >= self._train.patience:
            best = f"; its best is {self._sign * self._best:.6g}" if math.isfinite(self._best) else ""
            count = self._without_improvement
            self.request(Stop("patience", f"{self._best_by} hasn't improved in {count} evaluations (--patience){best}"))


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(values) or "no figures"
