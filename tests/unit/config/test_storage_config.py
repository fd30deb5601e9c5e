"""Settings of storage: rejected values, and the translation of Ray's checkpoint settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lte_ray.config import StorageConfig
from lte_ray.errors import ConfigError
from lte_ray.trainer import _storage


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("keep_best", -1, "--keep-best is -1, but it must be at least 0"),
        ("keep_best", 1.5, "--keep-best is 1.5, but it must be a whole number"),
        ("keep_best", None, "--keep-best is None, but it must be a whole number"),
        ("best_by", 3, "--best-by is 3, but it must be the name of a figure"),
        ("storage_patience", -0.1, "--storage-patience is -0.1, but it must be at least 0"),
        ("storage_patience", float("inf"), "--storage-patience is inf, but it must be a finite number"),
        ("storage_patience", "long", "--storage-patience is 'long', but it must be a number"),
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
