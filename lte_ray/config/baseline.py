"""Ordinary training (``--baseline``) expressed with the settings of a run: one head that trains in full what all would train.

With N heads and batches of b samples, ordinary training on as many samples takes batches of N b. One head that accumulates the
gradients of N batches does that. It reads exactly the batches that N heads read in the same step, since all share one order of
batches (`lte_ray.data.partition`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lte_ray.config.failure import FailureConfig
from lte_ray.config.layer_rules import LayerConfig, Rule, parse_rules
from lte_ray.config.lora import LTEConfig
from lte_ray.config.merge import MergeConfig
from lte_ray.config.run import TrainConfig

OF_FACTORS = ("lora_r", "lora_alpha", "lora_bias", "base_dtype")
"""Settings of a rule that ordinary training ignores."""


def baseline_lte(lte: LTEConfig) -> LTEConfig:
    """One head in full rank. All that heads train trains, without factors; what only concerns factors doesn't count."""
    biases = ("*: lora_bias=replica",) if lte.others == "frozen" and lte.lora_bias == "lora" else ()
    rules = (f"{rule.pattern}: {rule.settings}" for rule in map(_without_factors, parse_rules(lte.layers)) if rule)
    return LTEConfig(
        num_heads=1,
        full_rank=True,
        adapt=lte.adapt,
        others=lte.others,
        exclude=lte.exclude,
        merge_buffers=lte.merge_buffers,
        layers=(*biases, *rules),
        strict=lte.strict,
    )


def baseline_merge(merge: MergeConfig) -> MergeConfig:
    """The plain average of one head, as often as heads would merge: the weights are evaluated and saved as often."""
    kept = {name: getattr(merge, name) for name in ("merge_iter", "merge_schedule", "merge_every", "rollback_z")}
    return MergeConfig(policy="average", **kept)


def baseline_train(train: TrainConfig, num_heads: int) -> TrainConfig:
    """A step takes the batches of `num_heads` heads."""
    return dataclasses.replace(train, accumulate=train.accumulate * num_heads, budget="auto")


def baseline_failure(failure: FailureConfig) -> FailureConfig:
    """One process, which doesn't grow."""
    return dataclasses.replace(failure, min_heads=1, max_heads=0)


def _without_factors(rule: Rule) -> Rule | None:
    """The rule without settings of factors; None if nothing else is in it."""
    nothing: dict[str, Any] = dict.fromkeys(OF_FACTORS)
    settings = dataclasses.replace(rule.settings, **nothing)
    return None if settings == LayerConfig() else Rule(rule.pattern, settings)
