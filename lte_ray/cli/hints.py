"""Unknown flags: one sentence that says what the flag is called here, also for names that other tools use."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lte_ray.config import suggest
from lte_ray.errors import ConfigError

_BATCH = "The size of a batch is the worker's: a worker that takes batch_size has --worker.batch-size."
_OF_WORKER = "It is the model's or the data's, so it is the worker's: flags --worker.NAME."
_LOCAL_STEPS = "The local steps between two merges are --merge-iter; a time between them is --merge-every."
_SAVE = "Checkpoints are written every --checkpoint-every merges."
_EVALUATE = "The merged weights are evaluated every --eval-every merges."
_WHERE = "A run is the folder --name in --storage."
_PRECISION = "Write --precision bf16-mixed or --precision fp16-mixed."
_LENGTH = "The length of a run is --steps (local steps of each head), or --epochs, --samples or --tokens."
_CLIP = "The maximum norm of a gradient is --clip-norm."
_ACCUMULATE = "Batches of one local step are --accumulate."
_RATE = "The learning rate is --lr; for a worker with its own build_optimizer it may be --worker.lr."
_HEADS = "Each head is a process: their number is --num-heads, their resources --cpus-per-head and --gpus-per-head."
_LAYERS = "All linear, attention and convolution layers have LoRA: choose with --adapt, --exclude and --layers."
_RESUME = "A run is continued with lte-ray resume RUN, or with --name NAME --resume."
_SHOWN = "A run's figures are in metrics.jsonl in its folder (docs/runs.md)."

ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("batch-size", "per-device-train-batch-size", "micro-batch-size", "train-batch-size"), _BATCH),
    **dict.fromkeys(("learning-rate", "peak-lr", "max-lr"), _RATE),
    **dict.fromkeys(("max-steps", "num-steps", "total-steps", "max-iters", "iterations"), _LENGTH),
    **dict.fromkeys(("num-train-epochs", "max-epochs", "num-epochs", "max-tokens"), _LENGTH),
    **dict.fromkeys(("max-grad-norm", "gradient-clip-val", "grad-clip", "clip-grad-norm"), _CLIP),
    **dict.fromkeys(("gradient-accumulation-steps", "accumulate-grad-batches", "grad-accum"), _ACCUMULATE),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed-precision", "torch-dtype", "dtype"), _PRECISION),
    **dict.fromkeys(("rank", "r", "lora-rank"), "The rank is --lora-r: one number, or one per head."),
    **dict.fromkeys(("alpha",), "Alpha is --lora-alpha."),
    **dict.fromkeys(
        ("lora-dropout", "dropout"),
        "Factors have no dropout, so that merging stays exact. Dropout of the model itself is the worker's.",
    ),
    **dict.fromkeys(("target-modules", "lora-target-modules", "modules-to-save", "rank-pattern"), _LAYERS),
    **dict.fromkeys(("report-to", "logger", "wandb", "wandb-project", "tensorboard", "logging-dir", "logging-steps"), _SHOWN),
    **dict.fromkeys(("output-dir", "out-dir", "default-root-dir", "save-dir", "run-name", "experiment-name"), _WHERE),
    **dict.fromkeys(("save-steps", "save-every", "save-interval", "save-strategy", "checkpoint-steps"), _SAVE),
    **dict.fromkeys(
        ("save-total-limit", "save-top-k"), "Checkpoints to keep are --keep-checkpoints, and the best --keep-best."
    ),
    **dict.fromkeys(("eval-steps", "val-check-interval", "eval-interval", "evaluation-strategy", "eval-strategy"), _EVALUATE),
    **dict.fromkeys(("resume-from-checkpoint", "resume-from", "ckpt-path", "restore"), _RESUME),
    **dict.fromkeys(
        ("dry-run", "fast-dev-run", "plan"),
        "lte-ray check WORKER tries a worker out, and lte-ray plan WORKER says what a run needs. Neither starts anything.",
    ),
    **dict.fromkeys(("local-steps", "sync-every", "merge-steps", "h", "inner-steps"), _LOCAL_STEPS),
    **dict.fromkeys(("outer-lr", "outer-momentum"), "Outer steps are the merge policy's: --policy nesterov --policy.lr 0.7."),
    **dict.fromkeys(("num-workers", "workers", "world-size", "nproc-per-node", "num-gpus", "devices", "gpus"), _HEADS),
    **dict.fromkeys(("verbose", "v", "debug"), "Write --log-level debug."),
    **dict.fromkeys(("ray-address",), "Write --address."),
    **dict.fromkeys(("gradient-checkpointing", "activation-checkpointing"), "Write --checkpoint-activations 'blocks.*'."),
    **dict.fromkeys(("lr-scheduler-type", "lr-schedule", "scheduler"), "The schedule of the learning rate is --schedule."),
    **dict.fromkeys(("warmup-steps", "warmup-ratio", "warmup-iters"), "Steps in which the learning rate rises are --warmup."),
    **dict.fromkeys(("optim", "optimizer-type"), "The optimizer is --optimizer."),
    **dict.fromkeys(("model-ema", "use-ema", "with-ema", "ema-decay", "model-ema-decay"), "Write --ema DECAY, per local step."),
    **dict.fromkeys(("torch-compile",), "Write --compile."),
    **dict.fromkeys(("data-seed", "random-seed"), "The seed is --seed."),
    **dict.fromkeys(
        ("model", "model-name", "model-name-or-path", "data", "dataset", "dataset-name", "max-seq-length"), _OF_WORKER
    ),
}
"""What a flag of another tool is here, by its name without dashes."""


def check_known(arguments: Collection[str], known: Collection[str], command: str) -> None:
    """Raises ConfigError for the first argument that looks like a flag and isn't one of the known."""
    for argument in arguments:
        name = argument.partition("=")[0]
        looks_so = name.startswith("--") or (name[:1] == "-" and name[1:2].isalpha())
        if looks_so and name not in known:
            raise ConfigError(describe_unknown(name, known, command))


def describe_unknown(name: str, known: Collection[str], command: str) -> str:
    """Says that there is no such flag, and what to write instead."""
    plain, begin = name.lstrip("-"), f"{command} has no flag {name}."
    if f"--worker.{plain}" in known:
        return f"{begin} It is the worker's: write --worker.{plain}."
    takes_settings = "--num-heads" in known
    if plain in ELSEWHERE and takes_settings:
        return f"{begin} {ELSEWHERE[plain]}"
    if not name.startswith("--"):
        return f"{begin} If it is a value, write it after a flag and =, as in --best-by=-accuracy."
    similar = suggest(name, [each for each in known if not each.startswith(("--worker.", "--policy."))])
    return f"{begin}{similar}" if similar else f"{begin} See {command} --help{'-all' if takes_settings else ''}."
