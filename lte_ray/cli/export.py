"""``lte-ray export``: exports a model from a run directory. Starts no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from lte_ray.config import suggest
from lte_ray.errors import ConfigError

FORMATS = ("safetensors", "pretrained", "peft")


@dataclass(frozen=True)
class Flags:
    """Exports a model from a run: its merged weights (safetensors, or a transformers folder), or a change as a LoRA adapter for
    PEFT."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help="The run directory, a path or URI.")]
    out: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="OUT", help="A folder that doesn't exist yet (with --to safetensors also a file, X.safetensors)."
        ),
    ]
    to: Annotated[str, tyro.conf.arg(metavar="FORMAT", help="safetensors, pretrained or peft.")]
    version: Annotated[int | None, tyro.conf.arg(help="Version of the checkpoint; by default the newest.")] = None
    head: Annotated[
        int | None,
        tyro.conf.arg(help="With --to peft: this head's change relative to the merged weights; by default the merged change."),
    ] = None
    rank: Annotated[
        int | None,
        tyro.conf.arg(help="With --to peft: maximum rank of a weight's change; by default the rank of the exact change."),
    ] = None
    dtype: Annotated[
        str, tyro.conf.arg(help="Type of the merged weights: auto (each weight's own in the model), fp32, bf16 or fp16.")
    ] = "auto"
    worker: Annotated[str | None, tyro.conf.arg(help="module:Class or file.py:Class, instead of the worker in run.toml.")] = (
        None
    )


def export(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``export``.

    Raises:
        UserError: as the functions of `lte_ray.export`, and for flags that contradict each other.
    """
    flags = tyro.cli(Flags, prog="lte-ray export", args=arguments)
    if flags.to not in FORMATS:
        raise ConfigError(f"--to is {flags.to!r}, but it must be one of: {', '.join(FORMATS)}.{suggest(flags.to, FORMATS)}")
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
