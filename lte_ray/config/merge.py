"""The settings of merging: when, how, and what travels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lte_ray.config.validation import at_least, flag, integers, setting, switches, words
from lte_ray.errors import ConfigError


@dataclass(frozen=True)
class MergeConfig:
    """When and how the heads' contributions are merged."""

    merge_iter: int = setting(10, "Local steps that a head takes between two contributions.")
    policy: Any = setting(
        "average",
        "How to merge: average, samples, stale, momentum, nesterov, delayed_nesterov, adam, median, trimmed_mean, clip, krum, "
        "ties, dare, gated, or your own as module:Class or path/to/file.py:Class. With its name, --help lists its arguments.",
    )
    policy_args: Mapping[str, Any] | None = setting(None, "The policy's own arguments; as flags, --policy.NAME VALUE.")
    merge_every: str = setting("", "Time between two contributions of a head instead, as 30s, 5m or 1h.")
    match_speed: bool = setting(
        False,
        "Faster heads take more steps between two contributions, so that all contribute together; the slowest, merge_iter.",
    )
    when: Literal["barrier", "quorum", "arrival"] = setting(
        "barrier", "When to merge: when all live heads have contributed (the paper), the first of them, or each on its own."
    )
    quorum: int = setting(0, "With --when quorum, contributions to merge at; 0: half of the live heads.")
    deadline: float = setting(0.0, "With --when quorum, seconds after the first contribution to merge anyway; 0: none.")
    wait: bool = setting(True, "Whether a head waits until its contribution is merged, or trains on meanwhile (--no-wait).")
    max_lag: int = setting(4, "With --no-wait: a head that falls more than so many versions behind is rebased in mid-round.")
    transfer: Literal["fp32", "bf16", "int8"] = setting(
        "fp32", "Format in which contributions travel. What rounding leaves out rides in the next contribution."
    )
    replica_topk: float = setting(
        1.0, "Share of the replica parameters that a contribution carries: those that changed most. The rest rides in the next."
    )
    send_down: Literal["auto", "dense", "factors"] = setting(
        "auto", "What heads get of a merge: the new base, the factors of what was merged, or for each layer what is less."
    )
    shards: int = setting(1, "Processes that merging is spread over, by layer, for big models.")
    merge_threads: int = setting(0, "Threads that the coordinator merges with; 0: one per 10^9 operations, up to its cores.")
    max_norm_z: float = setting(
        8.0, "Refuse contributions whose norm is so many robust standard deviations (of its log) above recent ones'; 0: never."
    )
    rollback_z: float = setting(
        0.0, "Go back to an earlier base when the loss is so many robust standard deviations above recent merges'; 0: never."
    )

    def __post_init__(self) -> None:
        integers(self, "merge_iter", "merge_threads", "quorum", "max_lag", "shards")
        at_least(self, 1, "merge_iter", "shards")
        at_least(self, 0, "merge_threads", "quorum", "max_lag", "deadline")
        switches(self, "match_speed", "wait")
        words(self, "when", ("barrier", "quorum", "arrival"))
        words(self, "transfer", ("fp32", "bf16", "int8"))
        words(self, "send_down", ("auto", "dense", "factors"))
        self._check_policy()
        seconds(self.merge_every)
        at_least(self, 0, "replica_topk", "max_norm_z", "rollback_z")
        for name in ("max_norm_z", "rollback_z"):
            if 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"{flag(name)} is {getattr(self, name)}, but it must be 0 (off) or at least 1: what is well lies up to "
                    "two or three standard deviations above the median."
                )
        if not 0 < self.replica_topk <= 1:
            raise ConfigError(f"--replica-topk is {self.replica_topk}, but it must be above 0 and at most 1.")
        if self.merge_every and self.match_speed:
            raise ConfigError("--merge-every and --match-speed contradict each other: both say how many steps a head takes.")

    def _check_policy(self) -> None:
        if self.when != "quorum" and (self.quorum or self.deadline):
            name = "quorum" if self.quorum else "deadline"
            raise ConfigError(f"--{name} is {getattr(self, name)}, but it only counts with --when quorum, not {self.when}.")
        if self.policy_args is None:
            return
        if not isinstance(self.policy_args, Mapping) or not all(isinstance(name, str) for name in self.policy_args):
            raise ConfigError(f"policy_args is {self.policy_args!r}, but it must be a dict of argument names and values.")
        object.__setattr__(self, "policy_args", dict(self.policy_args))

    @property
    def every_seconds(self) -> float:
        """`merge_every` in seconds; 0 where steps count."""
        return seconds(self.merge_every)


def seconds(text: str) -> float:
    """A length of time as ``30s``, ``5m`` or ``1h``, in seconds; 0 for an empty text.

    Raises:
        ConfigError: it has another form.
    """
    if not text:
        return 0.0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", str(text).strip())
    if not found or float(found[1]) <= 0:
        raise ConfigError(f"--merge-every is {text!r}, but it must be a time such as 30s, 5m or 1h.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
