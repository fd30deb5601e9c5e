"""The settings of a run: frozen dataclasses that check themselves.

One definition serves four places: the Python API, the flags of ``lte-ray train``, the TOML file, and
``run.toml``. A field's help text is its documentation in all of them. This file knows neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lte_ray.errors import ConfigError


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and the help text that users see."""
    return dataclasses.field(default=default, metadata={"help": help})


def flag(name: str) -> str:
    """The command-line flag of a field: ``merge_iter`` -> ``--merge-iter``."""
    return "--" + name.replace("_", "-")


def _at_least(config: object, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag(name)} is {value}, but it must be a finite number.")
        if value < low:
            raise ConfigError(f"{flag(name)} is {value}, but it must be at least {low}.")


def _integers(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{flag(name)} is {value!r}, but it must be a whole number.")


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{flag(name)} is {value}, but it must be a number above 0.")


@dataclass(frozen=True)
class LTEConfig:
    """The LoRA heads: how many, of what rank, and on which layers."""

    num_heads: int = setting(2, "Number of LoRA heads. Each is a Ray actor with its own copy of the main weights.")
    lora_r: int = setting(32, "Rank r of each head's factors A (r x in) and B (out x r).")
    lora_alpha: float = setting(64.0, "LoRA alpha. A head's product counts as s B A with s = alpha / r.")
    reset: Literal["none", "B"] = setting(
        "none", "What a head resets after a merge: none (reset-less LTE, the default) or B (B := 0; A is kept)."
    )
    exclude: tuple[str, ...] = setting(
        (), "Names of layers that get no LoRA and train as replicas, with wildcards, e.g. 'head' 'blocks.*.mlp'."
    )

    def __post_init__(self) -> None:
        _integers(self, "num_heads", "lora_r")
        _at_least(self, 1, "num_heads", "lora_r")
        _positive(self, "lora_alpha")
        if isinstance(self.exclude, str) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ConfigError(f"--exclude is {self.exclude!r}, but it must be a list of names.")
        if self.reset not in ("none", "B"):
            raise ConfigError(f"--reset is {self.reset!r}, but it must be 'none' or 'B'.")

    @property
    def scaling(self) -> float:
        """s = lora_alpha / lora_r, the factor of B A in the forward pass."""
        return self.lora_alpha / self.lora_r


@dataclass(frozen=True)
class MergeConfig:
    """When and how the heads' contributions are merged."""

    merge_iter: int = setting(10, "Local steps that a head takes between two contributions.")
    policy: Any = setting(
        "average", "Merge policy: a built-in name (average), or your own as module:Class or path/to/file.py:Class."
    )
    merge_threads: int = setting(0, "Threads that the coordinator merges with; 0: one per 10^9 operations, up to its cores.")

    def __post_init__(self) -> None:
        _integers(self, "merge_iter", "merge_threads")
        _at_least(self, 1, "merge_iter")
        _at_least(self, 0, "merge_threads")


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run, its seed, and how often it is evaluated and saved."""

    steps: int = setting(700, "Local steps of each head.")
    seed: int = setting(0, "Seed of the initial weights, every head's A, the data order and the random number generators.")
    eval_every: int = setting(10, "Evaluate the merged weights every so many merges, and at both ends; 0: at the end only.")
    checkpoint_every: int = setting(20, "Write a checkpoint every so many merges, and at the end; 0: at the end only.")
    threads_per_head: int = setting(0, "Threads that torch uses in each head; 0 means the CPUs per head, at least 1.")

    def __post_init__(self) -> None:
        _integers(self, "steps", "seed", "eval_every", "checkpoint_every", "threads_per_head")
        _at_least(self, 1, "steps")
        _at_least(self, 0, "seed", "eval_every", "checkpoint_every", "threads_per_head")


@dataclass(frozen=True)
class PlacementConfig:
    """What each head gets of the cluster. In Python this is Ray's ``ScalingConfig``."""

    cpus_per_head: float | None = setting(
        None, "CPUs reserved for each head; by default 1, or an equal share (at least 0.25) where heads outnumber the CPUs."
    )
    gpus_per_head: float | None = setting(
        None, "GPUs reserved for each head, fractions allowed; by default 1 where the cluster has one for every head, else 0."
    )
    resource_timeout: float = setting(
        0.0, "Seconds to wait for a cluster that grows on demand to offer the resources; 0: fail at once if it lacks them."
    )

    def __post_init__(self) -> None:
        for name in ("cpus_per_head", "gpus_per_head", "resource_timeout"):
            if getattr(self, name) is not None:
                _at_least(self, 0, name)
        gpus = self.gpus_per_head or 0
        if gpus > 1 and gpus != int(gpus):
            raise ConfigError(f"--gpus-per-head is {gpus}, but above 1 it must be a whole number.")


@dataclass(frozen=True)
class StorageConfig:
    """Where the run is kept. In Python this is Ray's ``RunConfig``."""

    name: str | None = setting(None, "Name of the run; by default the worker's name and the time.")
    storage: str | None = setting(
        None, "Folder or URI (s3://, gs://, file://) that holds run directories; by default Ray's own, ~/ray_results."
    )
    keep_checkpoints: int | None = setting(2, "Checkpoints kept, newest first; older ones are removed. 'None' keeps all.")
    resume: bool = setting(False, "Continue the run of this name from its newest complete checkpoint.")
    overwrite: bool = setting(False, "Replace the run of this name if there is one.")

    def __post_init__(self) -> None:
        check_run_name(self.name)
        if self.keep_checkpoints is not None:
            _at_least(self, 1, "keep_checkpoints")
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite contradict each other: give one of them.")
        if self.resume and not self.name:
            raise ConfigError("--resume needs --name, the run to continue.")


def check_run_name(name: str | None) -> None:
    """Raises ConfigError unless `name` is None or one plain folder name that can't leave the storage root."""
    if name is not None and (not name or name.startswith(".") or any(c in name for c in "/\\\0")):
        raise ConfigError(f"--name is {name!r}, but it must be one folder name, without slashes or a leading dot.")


SECTIONS: tuple[type, ...] = (LTEConfig, MergeConfig, TrainConfig, PlacementConfig, StorageConfig)
"""Every settings class, in the order in which ``--help`` and ``run.toml`` list them. No field name occurs twice."""


def near(name: str, known: Iterable[str]) -> str:
    """' Did you mean x?' for the known name nearest to `name`, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
