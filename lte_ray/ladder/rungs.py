"""The rungs of the authors' guidelines: ordinary training, mhlora, LTE that merges every step, then less and less often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.ladder import LadderConfig
from lte_ray.errors import ConfigError
from lte_ray.ladder.arms import Arm, spacing

ORDINARY, MHLORA = "ordinary", "mhlora"

COUNTERPARTS: Mapping[str, Any] = {"lora-plus": "adamw", "lora-muon": "muon"}
"""The optimizers of weights that correspond to those of factors."""

QUICK_STEPS = 50
"""Local steps of a quick ladder, at least."""

QUICK_MERGES = 5
"""Merges of a rung in a quick ladder, at least."""


def lte_rung(merge_iter: int) -> str:
    """The name of the rung that merges every `merge_iter` steps."""
    return f"merge_iter={merge_iter}"


def make_rungs(ladder: LadderConfig, lte: LTEConfig, merge: MergeConfig, train: TrainConfig) -> list[Arm]:
    """Returns the arms of the rungs, at the first seed and rate. All see equally many samples, and are evaluated as often.

    Raises:
        ConfigError: a setting contradicts a comparison at equal samples, or a merge_iter is above the number of steps.
    """
    _check(ladder, lte, merge, train)
    steps = max(QUICK_STEPS, train.steps // 10) if ladder.quick else train.steps
    merge_iters = _merge_iters(ladder, merge, steps)
    train = replace(train, steps=steps)
    every = spacing(steps, merge_iters or [1])
    arms = []
    for rung in ladder.rungs:
        if rung == "ordinary":
            ordinary = ordinary_training(train, ladder.ordinary_optimizer)
            arms.append(Arm(ORDINARY, lte, MergeConfig(merge_iter=every), ordinary, evaluate_every=every))
        elif rung == "mhlora":
            arms.append(Arm(MHLORA, lte, MergeConfig(), train, mode="mhlora", evaluate_every=every))
        else:
            arms += [Arm(lte_rung(k), lte, replace(merge, merge_iter=k), train, evaluate_every=every) for k in merge_iters]
    return [arm.with_rate(ladder.rates[0], (*ladder.seeds, train.seed)[0]) for arm in arms]


def ordinary_training(train: TrainConfig, optimizer: Any = "auto") -> TrainConfig:
    """Returns the settings of ordinary training that `train` is to be compared with.

    Args:
        train: of the heads.
        optimizer: as `LadderConfig.ordinary_optimizer`. One of another kind than the heads' has its default rates.
    """
    counterpart = COUNTERPARTS.get(train.optimizer, train.optimizer)
    if optimizer == counterpart == "auto":  # AdamW, whose rates aren't those of LoRA-Muon
        return replace(train, baseline=True, lr=None, replica_lr=None)
    if optimizer in ("auto", counterpart):
        return replace(train, baseline=True, optimizer=counterpart)
    return replace(train, baseline=True, optimizer=optimizer, lr=None, replica_lr=None)


def _merge_iters(ladder: LadderConfig, merge: MergeConfig, steps: int) -> Sequence[int]:
    if "lte" not in ladder.rungs:
        return ()
    given = ladder.merge_iters or (1, merge.merge_iter, 5 * merge.merge_iter)
    if ladder.merge_iters and max(given) > steps and not ladder.quick:
        raise ConfigError(
            f"--merge-iters has {max(given)}, but there are {steps} steps (--steps): that run would end before it merges."
        )
    least = QUICK_MERGES if ladder.quick else 2
    chosen = sorted({k for k in given if k * least <= steps or (ladder.merge_iters and not ladder.quick)})
    if not chosen:
        raise ConfigError(
            f"No rung of lte is left: with {steps} steps none of {', '.join(map(str, given))} merges {least} times. Give "
            "smaller --merge-iters, or more --steps."
        )
    return chosen


def _check(ladder: LadderConfig, lte: LTEConfig, merge: MergeConfig, train: TrainConfig) -> None:
    """Raises ConfigError for settings that a ladder sets itself, or that make rungs incomparable."""
    train.check_counts_steps("rungs are compared at equal steps")
    train.check_runs_to_end("all rungs of a ladder take all their steps")
    reasons = {
        "--baseline": (train.baseline, "the rung `ordinary` is ordinary training"),
        "--full-rank": (lte.full_rank, "the ladder compares factors with ordinary training"),
        "--adapt none": (not lte.adapt, "the ladder compares factors with ordinary training"),
        "--merge-schedule": (bool(merge.merge_schedule), "rungs merge after a number of steps (--merge-iters)"),
        "--merge-every": (bool(merge.merge_every), "rungs merge after a number of steps (--merge-iters)"),
        "--match-speed": (merge.match_speed, "rungs merge after a number of steps (--merge-iters)"),
        "--lr-scale": (train.lr_scale != 1.0, "the ladder multiplies the rates itself (--rates)"),
        "--no-wait": (not merge.wait and ladder.on == "process", "in one process heads wait for merges; give --on ray"),
    }
    for name, (given, why) in reasons.items():
        if given:
            raise ConfigError(f"lte-ray ladder takes no {name}: {why}. Leave it out.")
