"""The settings of how a run reacts to failures, and of how many heads it may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lte_ray.config.units import read_units
from lte_ray.config.validation import check_at_least, check_choice, check_integers, setting
from lte_ray.errors import ConfigError


@dataclass(frozen=True)
class FailureConfig:
    """What happens when a process fails or hangs. In Python also Ray's ``FailureConfig`` in its ``RunConfig``."""

    max_failures: int = setting(
        -1, "Failures of heads, coordinator and evaluator that a run survives; 0: the first one ends it; -1: any number."
    )
    head_failures: int = setting(
        3, "Consecutive failures of one head, without a merged contribution in between, that it survives; -1: any number."
    )
    exhausted: Literal["stop", "drop"] = setting(
        "stop",
        "What to do when a head has failed too often: stop the run, or drop the head and give others its data. With drop a run "
        "also continues without heads for which the cluster lacks resources, until it has them.",
    )
    backoff: float = setting(
        1.0,
        "Time before a head's second consecutive restart, then doubled up to a minute. The first restart is immediate.",
        unit="time",
    )
    rejoin: Literal["merged", "fresh"] = setting(
        "merged",
        "How a failed head restarts: with its factors as they were merged last (merged), or with new ones, B = 0 (fresh).",
    )
    min_heads: int = setting(1, "Minimum number of heads; with fewer the run stops. A head that is being restarted counts.")
    max_heads: int = setting(0, "Number of heads up to which a run grows while the cluster has resources; 0: --num-heads.")
    grace: float = setting(
        0.0,
        "Time allowed for saving after an interrupt; 0: as long as `ray job stop` allows (RAY_JOB_STOP_WAIT_TIME_S, 3 s).",
        unit="time",
    )

    def __post_init__(self) -> None:
        read_units(self)
        check_integers(self, "max_failures", "head_failures", "min_heads", "max_heads")
        check_at_least(self, -1, "max_failures", "head_failures")
        check_at_least(self, 1, "min_heads")
        check_at_least(self, 0, "max_heads", "backoff", "grace")
        check_choice(self, "exhausted", ("stop", "drop"))
        check_choice(self, "rejoin", ("merged", "fresh"))

    def check_heads(self, num_heads: int) -> None:
        """Raises ConfigError unless min_heads <= num_heads <= max_heads."""
        if self.min_heads > num_heads:
            raise ConfigError(f"--min-heads is {self.min_heads}, but there are {num_heads} heads: choose at most as many.")
        if self.max_heads and self.max_heads < num_heads:
            raise ConfigError(f"--max-heads is {self.max_heads}, but there are {num_heads} heads: choose at least as many.")
