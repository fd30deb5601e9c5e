"""The settings of a run: frozen dataclasses that check themselves.

One definition serves the Python API, the flags of ``lte-ray train``, the TOML file and ``run.toml``. A field's help text is its
documentation in all of them. No module here imports torch or Ray.
"""

from lte_ray.config.failure import FailureConfig
from lte_ray.config.layer_rules import BASE_DTYPES, BIASES, KINDS, LayerConfig, Rule
from lte_ray.config.lora import LTEConfig, Resolved
from lte_ray.config.merge import MergeConfig
from lte_ray.config.placement import PlacementConfig
from lte_ray.config.run import StorageConfig, TrainConfig
from lte_ray.config.validation import check_run_name, flag, suggest

SECTIONS: tuple[type, ...] = (LTEConfig, MergeConfig, TrainConfig, PlacementConfig, FailureConfig, StorageConfig)
"""All settings classes, in the order of ``--help`` and ``run.toml``. No field name occurs twice."""

__all__ = [
    "BASE_DTYPES",
    "BIASES",
    "KINDS",
    "SECTIONS",
    "FailureConfig",
    "LTEConfig",
    "LayerConfig",
    "MergeConfig",
    "PlacementConfig",
    "Resolved",
    "Rule",
    "StorageConfig",
    "TrainConfig",
    "check_run_name",
    "flag",
    "suggest",
]
