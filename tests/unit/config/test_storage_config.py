"""Settings of storage: rejected values, and the translation of Ray's checkpoint settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lte_ray.config import FailureConfig, StorageConfig
from lte_ray.errors import ConfigError
from lte_ray.trainer import _failure, _storage


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("keep_best", -1, "--keep-best is -1, but it must be at least 0"),
        ("keep_best", 1.5, "--keep-best is 1.5, but it must be a whole number"),
        ("keep_best", None, "--keep-best is None, but it must be a whole number"),
        ("best_by", 3, "--best-by is 3, but it must be the name of a figure"),
        ("log", ["wanbd"], "--log is 'wanbd', but it must be one of: auto, none, .* Did you mean wandb?"),
        ("log", "csv", "--log is 'csv', but it must be a list of names"),
        ("log", ["none", "csv"], "none means no sink"),
        ("storage_patience", -0.1, "--storage-patience is -0.1, but it must be at least 0"),
        ("storage_patience", float("inf"), "--storage-patience is inf, but it must be a finite number"),
        ("storage_patience", "long", "--storage-patience is 'long', but it must be a time such as 30s"),
    ],
)
def test_bad_values_are_rejected(setting: str, value: Any, said: str) -> None:
    """One error that names the flag and what it must be."""
    with pytest.raises(ConfigError, match=said):
        StorageConfig(**{setting: value})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, 0, "")),
        ({"num_to_keep": 3}, (3, 0, "")),
        ({"num_to_keep": 3, "checkpoint_score_attribute": "accuracy"}, (1, 3, "-accuracy")),
        ({"num_to_keep": 3, "checkpoint_score_attribute": "loss", "checkpoint_score_order": "min"}, (1, 3, "loss")),
        ({"checkpoint_score_attribute": "loss", "checkpoint_score_order": "min"}, (None, 0, "")),
    ],
)
def test_rays_checkpoint_config_is_translated(tmp_path: Path, given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """With a score Ray keeps the best and the newest checkpoint, else the newest ones; by default the highest score is best."""
    import ray.train

    config = ray.train.CheckpointConfig(**given)
    storage, _ = _storage(ray.train.RunConfig(name="a", storage_path=str(tmp_path), checkpoint_config=config))
    assert (storage.keep_checkpoints, storage.keep_best, storage.best_by) == expected


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("RunConfig", "worker_runtime_env", {"pip": ["x"]}),
        ("RunConfig", "logging_config", None),
        ("FailureConfig", "controller_failure_limit", 3),
        ("ScalingConfig", "use_tpu", True),
        ("ScalingConfig", "elastic_resize_monitor_interval_s", 5.0),
    ],
)
def test_settings_of_rays_that_a_run_does_not_follow_are_refused(kind: str, field: str, value: Any) -> None:
    """By the name of the field; defaults are fine."""
    import ray.train

    from lte_ray.runtime.placement import from_scaling_config

    if field not in inspect.signature(getattr(ray.train, kind)).parameters:
        pytest.skip(f"this Ray's {kind} has no {field}")
    if field == "logging_config":
        value = ray.train.LoggingConfig(log_level="DEBUG")
    more = {"num_workers": 1, "topology": "2x2", "accelerator_type": "TPU-V4"} if field == "use_tpu" else {}
    config = getattr(ray.train, kind)(**more, **{field: value})
    translate: dict[str, Callable[[], Any]] = {
        "RunConfig": lambda: _storage(config),
        "FailureConfig": lambda: _failure(ray.train.RunConfig(failure_config=config), FailureConfig()),
        "ScalingConfig": lambda: from_scaling_config(config, 2),
    }
    with pytest.raises(ConfigError, match=rf"^{kind}\({field}=.* would have no effect: .*leave {field} out\.$"):
        translate[kind]()


def test_impossible_sizes_of_rays_workers_are_refused() -> None:
    """No worker at all, and several GPUs for a process of heads."""
    import ray.train

    from lte_ray.runtime.placement import from_scaling_config

    for given, says in (
        ({"num_workers": 0}, r"num_workers=0\): .* at least 1"),
        ({"resources_per_worker": {"GPU": 2}, "use_gpu": True}, r"ScalingConfig\(resources_per_worker=\{'GPU': 2\}\)"),
    ):
        with pytest.raises(ConfigError, match=says):
            from_scaling_config(ray.train.ScalingConfig(**given), 2)
    followed = {"resources_per_worker": {"CPU": 2, "mine": 1}, "use_gpu": True, "placement_strategy": "SPREAD"}
    config, more = from_scaling_config(ray.train.ScalingConfig(**followed), 2)
    assert (config.cpus_per_head, config.gpus_per_head) == (2.0, 1.0)
    assert (config.placement_strategy, more) == ("SPREAD", {"other": {"mine": 1.0}})
