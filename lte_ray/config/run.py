"""The settings of training, resources and storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lte_ray.config.validation import at_least, check_run_name, integers, names_of, setting, switches, words
from lte_ray.errors import ConfigError

PRECISIONS = ("fp32", "bf16-mixed", "fp16-mixed")


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run, its seed, and how often it is evaluated and saved."""

    steps: int = setting(700, "Local steps of each head; on average, where heads share them (--budget).")
    budget: Literal["auto", "each", "shared"] = setting(
        "auto",
        "Who takes the steps: each head --steps, or all heads together --steps times --num-heads, whoever is faster more; "
        "auto: each where heads wait and take equally many, else shared.",
    )
    seed: int = setting(0, "Seed of the initial weights, every head's A, the data order and the random number generators.")
    eval_every: int = setting(10, "Evaluate the merged weights every so many merges, and at both ends; 0: at the end only.")
    checkpoint_every: int = setting(20, "Write a checkpoint every so many merges, and at the end; 0: at the end only.")
    threads_per_head: int = setting(
        0,
        "Threads that torch uses in each head; 0 means the CPUs per head, at least 1. An actor of several heads trains as many "
        "of them at once as it has CPUs for.",
    )
    precision: Literal["fp32", "bf16-mixed", "fp16-mixed"] = setting(
        "fp32", "What the heads compute in: fp32, or mixed (torch.autocast; fp16 with loss scaling). Merging stays fp32."
    )
    clip_norm: float = setting(0.0, "Largest norm of a head's gradient (all its factors and replicas); 0: no clipping.")
    accumulate: int = setting(1, "Batches of a local step: their gradients' mean is one optimizer step.")
    checkpoint_activations: tuple[str, ...] = setting(
        (), "Modules whose activations are computed again in the backward pass, with wildcards, e.g. 'blocks.*'; saves memory."
    )
    compile: bool = setting(False, "Compile each head's model with torch.compile: slow to start, faster steps.")

    def __post_init__(self) -> None:
        integers(self, "steps", "seed", "eval_every", "checkpoint_every", "threads_per_head", "accumulate")
        at_least(self, 1, "steps", "accumulate")
        at_least(self, 0, "seed", "eval_every", "checkpoint_every", "threads_per_head", "clip_norm")
        words(self, "precision", PRECISIONS)
        words(self, "budget", ("auto", "each", "shared"))
        names_of(self, "checkpoint_activations")
        switches(self, "compile")


@dataclass(frozen=True)
class PlacementConfig:
    """What each head gets of the cluster. In Python this is Ray's ``ScalingConfig``."""

    heads_per_actor: int = setting(
        1,
        "Heads that one actor hosts (virtual heads). They share what it gets, and one copy of the main weights (on CPUs one "
        "for each head that trains at the same time).",
    )
    stack_heads: Literal["auto", "always", "never"] = setting(
        "auto",
        "Whether an actor computes its heads as one batch or one by one; auto: one batch on a GPU, one by one on CPUs.",
    )
    cpus_per_head: float | None = setting(
        None,
        "CPUs reserved for each head's actor (for all its heads, if it hosts several); by default 1 a head, or an equal share "
        "(at least 0.25) where they outnumber the CPUs.",
    )
    gpus_per_head: float | None = setting(
        None,
        "GPUs reserved for each head's actor, fractions allowed; by default 1 where the cluster has one for each, else 0.",
    )
    resource_timeout: float = setting(
        0.0, "Seconds to wait for a cluster that grows on demand to offer the resources; 0: fail at once if it lacks them."
    )

    def __post_init__(self) -> None:
        integers(self, "heads_per_actor")
        at_least(self, 1, "heads_per_actor")
        words(self, "stack_heads", ("auto", "always", "never"))
        for name in ("cpus_per_head", "gpus_per_head", "resource_timeout"):
            if getattr(self, name) is not None:
                at_least(self, 0, name)
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
    keep_best: int = setting(0, "Checkpoints kept beside the newest: those with the best evaluations. 0: none.")
    best_by: str = setting(
        "", "Figure of the evaluation that --keep-best goes by, lowest best; '-accuracy': highest best. By default its first."
    )
    storage_patience: float = setting(
        60.0, "Seconds for which an operation on a storage that fails (full, slow, cut off) is tried again; 0: not at all."
    )
    resume: bool = setting(False, "Continue the run of this name from its newest complete checkpoint.")
    overwrite: bool = setting(False, "Replace the run of this name if there is one.")

    def __post_init__(self) -> None:
        check_run_name(self.name)
        switches(self, "resume", "overwrite")
        if self.keep_checkpoints is not None:
            integers(self, "keep_checkpoints")
            at_least(self, 1, "keep_checkpoints")
        integers(self, "keep_best")
        at_least(self, 0, "keep_best", "storage_patience")
        if not isinstance(self.best_by, str):
            raise ConfigError(f"--best-by is {self.best_by!r}, but it must be the name of a figure.")
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite contradict each other: give one of them.")
        if self.resume and not self.name:
            raise ConfigError("--resume needs --name, the run to continue.")
