"""``lte-ray export``: exports a model from a run directory. Starts no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from lte_ray.cli.settings_parser import parse_arguments, positional, required
from lte_ray.config.validation import setting
from lte_ray.errors import ConfigError


@dataclass(frozen=True)
class Flags:
    """Exports a model from a run: its merged weights (safetensors, or a transformers folder), or a change as a LoRA adapter for
    PEFT."""

    run: str = positional("RUN", "The run directory, a path or URI.")
    out: str = positional("OUT", "A folder that doesn't exist yet (with --to safetensors also a file, X.safetensors).")
    to: Literal["safetensors", "pretrained", "peft"] = required("Format: safetensors, pretrained or peft.")
    version: int | None = setting(None, "Version of the checkpoint; by default the newest.")
    head: int | None = setting(
        None, "With --to peft: this head's change relative to the merged weights; by default the merged change."
    )
    rank: int | None = setting(
        None, "With --to peft: maximum rank of a weight's change; by default the rank of the exact change."
    )
    dtype: str = setting("auto", "Type of the merged weights: auto (each weight's own in the model), fp32, bf16 or fp16.")
    worker: str | None = setting(
        None,
        "The worker, by name, module:Class or file.py:Class, instead of the one in run.toml.",
    )


def export(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``export``.

    Raises:
        UserError: as the functions of `lte_ray.export`, and for flags that contradict each other.
    """
    flags = parse_arguments(Flags, "lte-ray export RUN OUT --to FORMAT [flags]", arguments)
    for name in ("head", "rank"):
        if getattr(flags, name) is not None and flags.to != "peft":
            raise ConfigError(f"--{name} is for adapters: it needs --to peft, not --to {flags.to}.")
    if flags.dtype != "auto" and flags.to == "peft":
        raise ConfigError(f"--dtype {flags.dtype} is for merged weights: adapters are fp32. Leave it out.")
    from lte_ray import export as exporting

    if flags.to == "peft":
        written = exporting.peft_adapter(flags.run, flags.out, flags.head, flags.version, flags.rank, worker=flags.worker)
    else:
        write = exporting.save_pretrained if flags.to == "pretrained" else exporting.safetensors
        written = write(flags.run, flags.out, flags.version, dtype=flags.dtype, worker=flags.worker)
    console = Console(highlight=False)
    console.print(f"{flags.out}: {written.summary}.", markup=False, soft_wrap=True)
