"""What contradicts ``--never-merge``: heads with independent adapters share no weights, no data and no steps."""

from __future__ import annotations

from lte_ray.config.failure import FailureConfig
from lte_ray.config.lora import LTEConfig
from lte_ray.config.merge import MergeConfig
from lte_ray.config.run import TrainConfig
from lte_ray.config.validation import flag
from lte_ray.errors import ConfigError

POLICIES = ("auto", "average")
"""Policies that set nothing but when a version follows."""


def check_never_merge(lte: LTEConfig, merge: MergeConfig, train: TrainConfig) -> None:
    """Raises ConfigError for settings that concern what heads share, if nothing is merged."""
    if not merge.never_merge:
        return
    reasons = {
        "--reset B": (lte.reset == "B", "B is reset at a merge"),
        "--full-rank": (lte.full_rank, "heads train no adapters then"),
        "--baseline": (train.baseline, "ordinary training has no heads"),
        f"--policy {merge.policy}": (merge.policy not in POLICIES, "there is nothing to decide about"),
        f"--send-down {merge.send_down}": (merge.send_down != "auto", "heads receive no weights"),
        f"--shards {merge.shards}": (merge.shards > 1, "shards share the merging"),
        f"--rollback-z {merge.rollback_z:g}": (merge.rollback_z > 0, "one head's loss would set back all heads"),
        f"--ema {train.ema:g}": (train.ema > 0, "the base doesn't move"),
        "--budget shared": (train.budget == "shared", "each head trains its own adapter for all --steps"),
    }
    _refuse(reasons)


def check_failures(failure: FailureConfig, num_heads: int) -> None:
    """Raises ConfigError for reactions to failures that move data between heads, or drop what a head has trained."""
    reasons = {
        "--exhausted drop": (failure.exhausted == "drop", "the data of a lost head would go into other adapters"),
        "--rejoin fresh": (failure.rejoin == "fresh", "a restarted head would lose its adapter"),
        f"--max-heads {failure.max_heads}": (failure.max_heads > num_heads, "a new head would take the data of others"),
    }
    _refuse(reasons)


def _refuse(reasons: dict[str, tuple[bool, str]]) -> None:
    for given, (contradicts, why) in reasons.items():
        if contradicts:
            raise ConfigError(f"{flag('never_merge')} and {given} contradict each other: {why}. Leave one of them out.")
