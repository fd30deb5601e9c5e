"""The settings of merging: when and how to merge, and in which format contributions and bases travel."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lte_ray.config.units import has_unit, read_units, seconds
from lte_ray.config.validation import check_at_least, check_booleans, check_choice, check_integers, flag, setting
from lte_ray.errors import ConfigError

ROUNDED_CHANGES = ("bf16", "int8")
"""Choices of `send_down` that send the change of the base, rounded, instead of the base."""


@dataclass(frozen=True)
class MergeConfig:
    """When and how the heads' contributions are merged."""

    merge_iter: int = setting(10, "Local steps of a head between two contributions.")
    policy: Any = setting(
        "auto",
        "How to merge: auto (orthogonal or nesterov if the heads' optimizer orthogonalizes, otherwise average), average, "
        "samples, stale, momentum, nesterov, delayed_nesterov, schedule_free, adam, orthogonal, median, trimmed_mean, clip, "
        "krum, ties, dare, gated, or your own as module:Class or path/to/file.py:Class. --policy NAME --help lists its "
        "arguments.",
    )
    policy_args: Mapping[str, Any] | None = setting(None, "The policy's own arguments; as flags: --policy.NAME VALUE.")
    merge_schedule: str = setting(
        "",
        "Local steps between two contributions by part of the run, instead of --merge-iter: pairs START:STEPS, START from 0 to "
        "1. '0:1 0.05:10' merges after each step in the first twentieth of the run, then after every ten.",
    )
    merge_every: str = setting("", "Time between two contributions of a head, instead of --merge-iter: 30s, 5m or 1h.")
    match_speed: bool = setting(
        False,
        "Let faster heads take more steps between two contributions, so that all contribute together. The slowest head takes "
        "--merge-iter steps.",
    )
    when: Literal["barrier", "quorum", "arrival"] = setting(
        "barrier",
        "When to merge: barrier (all live heads have contributed, as in the paper), quorum (the first few have), or arrival "
        "(each contribution by itself).",
    )
    quorum: int = setting(0, "With --when quorum: number of contributions to merge at; 0: half of the live heads.")
    deadline: float = setting(
        0.0, "With --when quorum: time after the first contribution to merge with fewer; 0: no deadline.", unit="time"
    )
    wait: bool = setting(
        True, "Let a head wait until its contribution is merged. With --no-wait it keeps training in the meantime."
    )
    max_lag: int | None = setting(
        None,
        "With --no-wait: maximum lag in versions; a head that lags more rebases in mid-round. By default 4; with --policy "
        "orthogonal a quarter of the heads, at least 1.",
    )
    transfer: Literal["fp32", "bf16", "int8"] = setting(
        "fp32", "Format in which contributions are sent. The rounding error is added to the next contribution."
    )
    replica_topk: float = setting(
        1.0, "Fraction of the replica parameters sent in a contribution, largest changes first. The rest is sent later."
    )
    send_down: Literal["auto", "dense", "factors", "bf16", "int8"] = setting(
        "auto",
        "What heads receive after a merge: the new base (dense), the merged factors (factors), for each layer the smaller of "
        "the two (auto), or the change of the base, rounded (bf16, int8). The rounding error is added to the next change.",
    )
    never_merge: bool = setting(
        False,
        "Train independent adapters: each head trains its own LoRA on the initial weights, which stay as they are, and nothing "
        "is merged. lte-ray export --head N exports them one by one. Needs --others frozen.",
    )
    shards: int = setting(1, "Processes that share the merging, by layer, for large models.")
    merge_threads: int = setting(0, "Threads of the coordinator for merging; 0: one per 10^9 operations, up to its cores.")
    max_norm_z: float = setting(
        8.0,
        "Refuse contributions whose log norm is more than this many robust standard deviations above that of recent ones; "
        "0: never.",
    )
    measure_every: int = setting(
        0,
        "Number of merges after which to measure again how well the heads' changes agree, and the effective rank of their "
        "mean; 0: never. It takes longer than the merge, and the heads may wait for it.",
    )
    rollback_z: float = setting(
        0.0,
        "Roll back to an earlier base when the loss is more than this many robust standard deviations above that of recent "
        "merges; 0: never.",
    )

    def __post_init__(self) -> None:
        read_units(self)
        lag = () if self.max_lag is None else ("max_lag",)
        check_integers(self, "measure_every", "merge_iter", "merge_threads", "quorum", "shards", *lag)
        check_at_least(self, 1, "merge_iter", "shards")
        check_at_least(self, 0, "measure_every", "merge_threads", "quorum", "deadline", *lag)
        check_booleans(self, "match_speed", "never_merge", "wait")
        check_choice(self, "when", ("barrier", "quorum", "arrival"))
        check_choice(self, "transfer", ("fp32", "bf16", "int8"))
        check_choice(self, "send_down", ("auto", "dense", "factors", *ROUNDED_CHANGES))
        self._check_policy()
        parse_duration(self.merge_every)
        if parse_schedule(str(self.merge_schedule)) and self.merge_every:
            raise ConfigError(
                "--merge-schedule and --merge-every contradict each other: both set the length of a round. Leave one out."
            )
        check_at_least(self, 0, "replica_topk", "max_norm_z", "rollback_z")
        for name in ("max_norm_z", "rollback_z"):
            if 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"{flag(name)} is {getattr(self, name)}, but it must be 0 (off) or at least 1: healthy values lie up "
                    "to two or three standard deviations above the median."
                )
        if not 0 < self.replica_topk <= 1:
            raise ConfigError(f"--replica-topk is {self.replica_topk}, but it must be above 0 and at most 1.")
        if self.measure_every and (self.shards > 1 or self.never_merge):
            other = "--never-merge merges none" if self.never_merge else f"--shards {self.shards} divides them"
            raise ConfigError(
                f"--measure-every is {self.measure_every}, which needs the heads' changes in one process, but {other}. "
                "Leave it out."
            )
        if self.merge_every and self.match_speed:
            raise ConfigError("--merge-every and --match-speed contradict each other: both set how many steps a head takes.")

    def _check_policy(self) -> None:
        if self.when != "quorum" and (self.quorum or self.deadline):
            name = "quorum" if self.quorum else "deadline"
            raise ConfigError(f"--{name} is {getattr(self, name)}, but it only counts with --when quorum, not {self.when}.")
        if self.policy_args is None:
            return
        if not isinstance(self.policy_args, Mapping) or not all(isinstance(name, str) for name in self.policy_args):
            raise ConfigError(f"policy_args is {self.policy_args!r}, but it must be a dict of argument names and values.")
        object.__setattr__(self, "policy_args", dict(self.policy_args))

    def steps_between(self, progress: float) -> int:
        """Local steps of a round that begins when this part of the run is done, 0 to 1."""
        reached = [steps for start, steps in parse_schedule(self.merge_schedule) if start <= progress]
        return reached[-1] if reached else self.merge_iter

    @property
    def every_seconds(self) -> float:
        """`merge_every` in seconds; 0 if a round is counted in steps."""
        return parse_duration(self.merge_every)


@functools.cache
def parse_schedule(text: str) -> tuple[tuple[float, int], ...]:
    """Parses ``0:1 0.05:10`` into pairs of a start and steps; an empty text has none.

    Raises:
        ConfigError: it has another form, doesn't start at 0, or its starts don't ascend.
    """
    pairs = [re.fullmatch(r"(\d+(?:\.\d+)?):(\d+)", part) for part in text.split()]
    schedule = tuple((float(pair[1]), int(pair[2])) for pair in pairs if pair)
    starts = [start for start, _ in schedule]
    ascending = starts == sorted(set(starts)) and starts[:1] in ([], [0.0]) and starts[-1:] < [1.0]
    if len(schedule) != len(pairs) or not ascending or any(steps < 1 for _, steps in schedule):
        raise ConfigError(
            f"--merge-schedule is {text!r}, but it must be pairs START:STEPS with ascending starts from 0 to below 1, and at "
            "least 1 step, such as '0:1 0.05:10'."
        )
    return schedule


def parse_duration(text: str) -> float:
    """Parses the time of ``--merge-every`` into seconds; an empty text is 0.

    Raises:
        ConfigError: it has another form. A number needs a unit here, since it could be meant as steps.
    """
    if not text:
        return 0.0
    with contextlib.suppress(ConfigError):
        if has_unit(text) and (duration := seconds(text)) > 0:
            return duration
    raise ConfigError(f"--merge-every is {text!r}, but it must be a time such as 30s, 5m or 1h.")
