"""Ray's own settings classes: what a run doesn't follow in them is refused, not ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lte_ray.errors import ConfigError

RUN = ("name", "storage_path", "storage_filesystem", "failure_config", "checkpoint_config", "callbacks")
CHECKPOINTS = ("num_to_keep", "checkpoint_score_attribute", "checkpoint_score_order")
FAILURES = ("max_failures",)
SCALING = ("num_workers", "use_gpu", "resources_per_worker", "placement_strategy", "accelerator_type", "label_selector")
"""The fields of Ray's RunConfig, CheckpointConfig, FailureConfig and ScalingConfig that a run follows."""

INSTEAD: Mapping[str, str] = {
    "worker_runtime_env": "Give the environment to ray.init(runtime_env=...), or to ray job submit",
    "logging_config": "Set up Python's logging (the logger lte_ray)",
    "controller_failure_limit": "Give LTETrainer(failure=lte_ray.FailureConfig(...)), which says what may die how often",
    "max_preemption_failures": "Give LTETrainer(failure=lte_ray.FailureConfig(...)), which says what may die how often",
}
"""What to do instead, by the field."""


def check_followed(config: Any, followed: tuple[str, ...]) -> None:
    """Raises ConfigError if a field of one of Ray's settings classes that a run doesn't follow isn't its default."""
    default, kind = type(config)(), type(config).__name__
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in followed and value != getattr(default, field.name):
            instead = INSTEAD.get(field.name, "A run decides that itself")
            raise ConfigError(
                f"{kind}({field.name}={str(value)[:80]}) would have no effect: of Ray's {kind}, LTETrainer follows only "
                f"{', '.join(followed)}. {instead}, and leave {field.name} out."
            )
