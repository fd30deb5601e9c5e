"""The settings of training and storage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from lte_ray.config.profile_window import parse_window
from lte_ray.config.stopping import TRAIN_LOSS, parse_condition
from lte_ray.config.units import read_units
from lte_ray.config.validation import (
    check_at_least,
    check_booleans,
    check_choice,
    check_integers,
    check_run_name,
    flag,
    setting,
    suggest,
    to_name_tuples,
)
from lte_ray.errors import ConfigError

PRECISIONS = ("fp32", "bf16-mixed", "fp16-mixed")
OPTIMIZERS = ("auto", "adamw", "lora-plus", "lora-muon", "muon")
SCHEDULES = ("auto", "constant", "cosine", "linear")

AUTO, NO_LOG = "auto", "none"
LOGS = (AUTO, NO_LOG, "tensorboard", "wandb", "mlflow", "csv", "prometheus")
"""The words that --log takes in addition to classes."""
STEPS = 700
LENGTHS = ("epochs", "samples", "tokens")
"""Settings that say how long a run is, instead of its steps."""


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run, its seed, and how often it is evaluated and saved."""

    steps: int = setting(STEPS, "Local steps of each head, or on average per head if they share the steps (--budget).")
    epochs: float | None = setting(
        None,
        "Length of the run in passes through the data, all heads together, instead of --steps. The worker's data must have a "
        "size: batches from shard.indices(size, batch_size) have one.",
    )
    samples: float | None = setting(
        None, "Length of the run in samples, all heads together, instead of --steps; rounded up to whole steps."
    )
    tokens: float | None = setting(
        None,
        "Length of the run in tokens, all heads together, instead of --steps; rounded up to whole steps. The worker says how "
        "many tokens a sample has (tokens_per_sample), unless its batches have input_ids.",
    )
    budget: Literal["auto", "each", "shared"] = setting(
        "auto",
        "How the steps are divided: each (every head takes --steps), shared (all heads together take --steps times "
        "--num-heads; faster heads take more), or auto (each if heads wait and take equally many, else shared).",
    )
    seed: int = setting(
        0, "Seed of the initial weights, of every head's A, of the data order and of the random number generators."
    )
    init_from: str | None = setting(
        None,
        "Weights to start from, instead of those of build_model(): a finished run (its name, path or URI), a "
        ".safetensors file, or a folder with a model of transformers or an adapter of PEFT. Every node must be able to read "
        "it.",
    )
    eval_every: int = setting(10, "Evaluate the merged weights every N merges, and at the start and end; 0: only at the end.")
    checkpoint_every: int = setting(20, "Write a checkpoint every N merges, and at the end; 0: only at the end.")
    threads_per_head: int = setting(
        0,
        "Threads of torch in each head; 0: the CPUs per head, at least 1. An actor of several heads trains as many of them at "
        "once as it has CPUs for.",
    )
    precision: Literal["fp32", "bf16-mixed", "fp16-mixed"] = setting(
        "fp32", "Precision of the heads: fp32, or mixed (torch.autocast; fp16 with loss scaling). Merging is always fp32."
    )
    optimizer: Literal["auto", "adamw", "lora-plus", "lora-muon", "muon"] = setting(
        "auto",
        "Optimizer of a worker without build_optimizer(): adamw, lora-plus (AdamW with a rate 4 times as high for B), "
        "lora-muon, muon (for weights that train in full), or auto (lora-muon; with --full-rank muon, with --baseline adamw).",
    )
    lr: float | None = setting(
        None,
        "Learning rate of a worker without build_optimizer(); by default 0.05 for lora-muon, 0.02 for muon, else 0.001.",
    )
    replica_lr: float | None = setting(
        None,
        "Learning rate of the replicas instead of --lr, for a worker without build_optimizer(); by default 0.01 for "
        "lora-muon and muon, 0.001 for lora-plus, and --lr for adamw.",
    )
    schedule: Literal["auto", "constant", "cosine", "linear"] = setting(
        "auto",
        "Learning-rate schedule of a worker without build_schedule(), after a warm-up: constant, cosine or linear (both to a "
        "tenth), or auto (cosine; none if the worker has a build_optimizer()).",
    )
    warmup: int | None = setting(
        None, "Local steps in which --schedule raises the learning rate; by default 50, and at most a quarter of all."
    )
    clip_norm: float = setting(0.0, "Maximum norm of a head's gradient (of all its factors and replicas); 0: no clipping.")
    ema: float = setting(
        0.0,
        "Decay per local step, such as 0.999, of an exponential moving average (EMA) of the merged weights, which is evaluated "
        "and exported in addition to them; 0: none. A merge after k local steps of each head applies it k times. At step n it "
        "is at most (1 + n) / (10 + n), so that a short run's average forgets the initial weights.",
    )
    accumulate: int = setting(1, "Batches of a local step; the mean of their gradients is used in one optimizer step.")
    weight_decay: float | None = setting(
        None,
        "Weight decay of a worker without build_optimizer(), relative to the learning rate: of the product of the factors, or "
        "of whole weights that would have factors. Replicas don't decay. By default 0.",
    )
    lr_scale: float = setting(
        1.0, "Multiplier of all learning rates of the optimizer, applied before the schedule is built: for sweeps."
    )
    checkpoint_activations: tuple[str, ...] = setting(
        (), "Modules whose activations are recomputed in the backward pass to save memory, with wildcards, e.g. 'blocks.*'."
    )
    baseline: bool = setting(
        False,
        "Ordinary training, to compare with: one process trains all weights in full, and each step takes the batches of "
        "--num-heads heads. Settings of factors and merging don't count, except that --merge-iter says how often the weights "
        "may be evaluated and saved.",
    )
    baseline_processes: int = setting(
        1,
        "Processes of --baseline. They divide the batches of each step equally and average their gradients (Ray Train's "
        "TorchTrainer).",
    )
    compile: bool = setting(False, "Compile each head's model with torch.compile: slower start, faster steps.")
    max_time: float = setting(
        0.0,
        "Time after which the run ends early, saved, exported and evaluated, counted from the start of this process, also if "
        "the run is resumed: 90m, 3h, 1d or seconds; 0: no limit. --resume continues it.",
        unit="time",
    )
    stop_when: str = setting(
        "",
        "Condition on a figure of the evaluation, or on train_loss, at which the run ends early: a name, one of < <= > >=, and "
        "a number, in quotes: 'loss<2.3'.",
    )
    patience: int = setting(
        0,
        "Evaluations in a row without a better figure (--best-by; by default the first) after which the run ends early; 0: any "
        "number.",
    )
    profile: str = setting(
        "",
        "First and last local step to record, such as 20:30: the torch profiler writes traces of head 0 and of the coordinator "
        "into the run's folder profile, for https://ui.perfetto.dev.",
    )
    callback: tuple[str, ...] = setting(
        (),
        "Callbacks that the driver calls during the run: path/to/file.py:Class or package.module:Class, classes without "
        "arguments that derive from lte_ray.Callback, or instances.",
    )

    def __post_init__(self) -> None:
        read_units(self)
        check_integers(self, "steps", "seed", "eval_every", "checkpoint_every", "threads_per_head", "accumulate")
        check_integers(self, "baseline_processes")
        check_at_least(self, 1, "steps", "accumulate", "baseline_processes")
        check_at_least(self, 0, "seed", "eval_every", "checkpoint_every", "threads_per_head", "clip_norm")
        check_at_least(self, 0, "lr_scale", "ema")
        if self.ema >= 1:
            raise ConfigError(f"--ema is {self.ema}, but it must be below 1: a decay per local step, such as 0.999; 0 is off.")
        check_choice(self, "precision", PRECISIONS)
        check_choice(self, "optimizer", OPTIMIZERS)
        check_choice(self, "schedule", SCHEDULES)
        optional = ("lr", "replica_lr", "warmup", "weight_decay", *LENGTHS)
        check_at_least(self, 0, *(name for name in optional if getattr(self, name) is not None))
        if self.warmup is not None:
            check_integers(self, "warmup")
        check_choice(self, "budget", ("auto", "each", "shared"))
        to_name_tuples(self, "checkpoint_activations")
        check_booleans(self, "baseline", "compile")
        if self.init_from is not None and (not isinstance(self.init_from, str) or not self.init_from):
            raise ConfigError(f"--init-from is {self.init_from!r}, but it must be a path or URI.")
        self._check_length()
        self._check_stops()
        parse_window(self.profile)
        if self.baseline_processes > 1 and not self.baseline:
            raise ConfigError(
                f"--baseline-processes is {self.baseline_processes}, but this run isn't ordinary training. Add --baseline, or "
                "leave it out: --num-heads says how many processes an LTE run has."
            )

    @property
    def length(self) -> str | None:
        """Which of epochs, samples and tokens says how long the run is; None if `steps` does."""
        return next((name for name in LENGTHS if getattr(self, name) is not None), None)

    def with_steps(self, steps: int) -> TrainConfig:
        """Returns the settings of a run that is that many local steps long."""
        return replace(self, steps=steps, epochs=None, samples=None, tokens=None)

    def check_counts_steps(self, what: str) -> None:
        """Raises ConfigError unless `steps` says how long the run is, for `what`, which knows no data."""
        if self.length is not None:
            raise ConfigError(f"{flag(self.length)} is {getattr(self, self.length):g}, but {what}. Give --steps instead.")

    def check_runs_to_end(self, what: str) -> None:
        """Raises ConfigError for settings that end a run early or follow it, for `what`, which doesn't."""
        for name in ("max_time", "stop_when", "patience", "callback"):
            if value := getattr(self, name):
                shown = f"{value:g}" if isinstance(value, float) else repr(value)
                raise ConfigError(f"{flag(name)} is {shown}, but {what}. Leave it out.")

    def _check_stops(self) -> None:
        check_at_least(self, 0, "max_time", "patience")
        check_integers(self, "patience")
        to_name_tuples(self, "callback")
        needs = "--patience" if self.patience else ""
        if self.stop_when or not isinstance(self.stop_when, str):
            needs = needs if parse_condition(self.stop_when).name == TRAIN_LOSS else f"--stop-when {self.stop_when!r}"
        if needs and not self.eval_every:
            raise ConfigError(f"{needs} needs evaluations during the run, but --eval-every is 0. Raise it, or leave that out.")

    def _check_length(self) -> None:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if given and self.steps != STEPS:
            given.append("steps")
        if len(given) > 1:
            shown = " and ".join(f"{flag(name)} {getattr(self, name):g}" for name in given)
            raise ConfigError(f"{shown} each say how long the run is. Leave one of them out.")
        if given and getattr(self, given[0]) <= 0:
            raise ConfigError(f"{flag(given[0])} is {getattr(self, given[0]):g}, but it must be above 0.")


@dataclass(frozen=True)
class StorageConfig:
    """Where the run is stored. In Python also Ray's ``RunConfig``."""

    name: str | None = setting(None, "Name of the run; by default the worker's name and the time.")
    storage: str | None = setting(
        None, "Folder or URI (s3://, gs://, file://) for run directories; by default Ray's, ~/ray_results."
    )
    keep_checkpoints: int | None = setting(2, "Number of newest checkpoints to keep; older ones are removed. 'None' keeps all.")
    keep_best: int = setting(0, "Number of checkpoints with the best evaluations to keep in addition to the newest.")
    best_by: str = setting(
        "",
        "Figure of the evaluation that --keep-best compares; lowest is best, or highest with a dash: '-accuracy'. By default "
        "the first.",
    )
    storage_patience: float = setting(
        60.0,
        "Time for which a failing storage operation (disk full, slow, network lost) is retried; 0: not at all.",
        unit="time",
    )
    log: tuple[str, ...] = setting(
        (AUTO,),
        "Where figures go in addition to metrics.jsonl: tensorboard, wandb, mlflow, csv, prometheus, a class of your own "
        "(file.py:Class), auto (tensorboard where it is installed, and prometheus), or none. Several may be given.",
    )
    resume: bool = setting(False, "Continue the run of this name from its newest complete checkpoint.")
    overwrite: bool = setting(False, "Replace the run of this name, if there is one.")

    def __post_init__(self) -> None:
        read_units(self)
        check_run_name(self.name)
        check_booleans(self, "resume", "overwrite")
        to_name_tuples(self, "log")
        check_log_names(self.log)
        if self.keep_checkpoints is not None:
            check_integers(self, "keep_checkpoints")
            check_at_least(self, 1, "keep_checkpoints")
        check_integers(self, "keep_best")
        check_at_least(self, 0, "keep_best", "storage_patience")
        if not isinstance(self.best_by, str):
            raise ConfigError(f"--best-by is {self.best_by!r}, but it must be the name of a figure.")
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite contradict each other: give one of them.")
        if self.resume and not self.name:
            raise ConfigError("--resume needs --name, the run to continue.")


def check_log_names(names: Iterable[str]) -> None:
    """Raises ConfigError unless each name is a sink's, or says where its class is."""
    names = list(names)
    for name in names:
        if name not in LOGS and ":" not in name:
            raise ConfigError(
                f"--log is {name!r}, but it must be one of: {', '.join(LOGS)}; or a class: package.module:Class or "
                f"path/to/file.py:Class.{suggest(name, LOGS)}"
            )
    if NO_LOG in names and len(names) > 1:
        raise ConfigError(f"--log is {' '.join(names)!r}, but {NO_LOG} means no sink: leave out {NO_LOG}, or the others.")
