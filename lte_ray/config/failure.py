"""The settings of what happens when processes die, and of how many heads there may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lte_ray.config.validation import at_least, integers, setting, words
from lte_ray.errors import ConfigError


@dataclass(frozen=True)
class FailureConfig:
    """What happens when a process dies or hangs. In Python also Ray's ``FailureConfig`` in its ``RunConfig``."""

    max_failures: int = setting(
        -1, "Deaths of heads, coordinator and evaluator that a run survives; 0: the first ends it; -1: any number."
    )
    head_failures: int = setting(
        3, "Deaths of one head in a row, without a merged contribution in between, that it survives; -1: any number."
    )
    exhausted: Literal["stop", "drop"] = setting(
        "stop",
        "What happens to a head that died too often: stop ends the run, drop goes on without it; others take its data. "
        "With drop a run also goes on without heads that the cluster has no room for, until it has some.",
    )
    backoff: float = setting(
        1.0, "Seconds before a head's second restart in a row; they double up to a minute. The first is at once."
    )
    rejoin: Literal["merged", "fresh"] = setting(
        "merged", "How a head that died begins: with its factors as they were merged last, or with new ones (B = 0)."
    )
    min_heads: int = setting(1, "Heads that a run needs; with fewer it stops. A head that is being restarted counts.")
    max_heads: int = setting(0, "Heads up to which a run grows while the cluster has room for more; 0: --num-heads.")
    grace: float = setting(
        0.0,
        "Seconds that an interrupted run takes to save itself; 0: what `ray job stop` leaves (RAY_JOB_STOP_WAIT_TIME_S, 3).",
    )

    def __post_init__(self) -> None:
        integers(self, "max_failures", "head_failures", "min_heads", "max_heads")
        at_least(self, -1, "max_failures", "head_failures")
        at_least(self, 1, "min_heads")
        at_least(self, 0, "max_heads", "backoff", "grace")
        words(self, "exhausted", ("stop", "drop"))
        words(self, "rejoin", ("merged", "fresh"))

    def check_heads(self, num_heads: int) -> None:
        """Raises ConfigError unless min_heads <= num_heads <= max_heads."""
        if self.min_heads > num_heads:
            raise ConfigError(f"--min-heads is {self.min_heads}, but there are {num_heads} heads: choose at most as many.")
        if self.max_heads and self.max_heads < num_heads:
            raise ConfigError(f"--max-heads is {self.max_heads}, but there are {num_heads} heads: choose at least as many.")
