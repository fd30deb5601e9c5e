"""``lte-ray export``: takes a model out of a run directory. Starts no Ray."""

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
    """Takes a model out of a run: its merged weights (safetensors, or as transformers' save_pretrained), or a change as a
    LoRA adapter that PEFT loads."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help="The run directory, a path or URI.")]
    out: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="OUT", help="A folder that isn't there yet (with --to safetensors also a file, X.safetensors)."),
    ]
    to: Annotated[str, tyro.conf.arg(metavar="FORMAT", help="safetensors, pretrained or peft.")]
    version: Annotated[int | None, tyro.conf.arg(help="Version of the checkpoint; by default the newest.")] = None
    head: Annotated[
        int | None,
        tyro.conf.arg(
            help="With --to peft: this head's change beyond the merged weights; by default the average's since the start."
        ),
    ] = None
    rank: Annotated[
        int | None, tyro.conf.arg(help="With --to peft: the largest rank of a weight's change; by default what is exact.")
    ] = None
    worker: Annotated[
        str | None, tyro.conf.arg(help="module:Class or file.py:Class, instead of the worker that run.toml names.")
    ] = None


def export(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments behind ``export``.

    Raises:
        UserError: as the functions of `lte_ray.export`, and for flags that don't fit together.
    """
    flags = tyro.cli(Flags, prog="lte-ray export", args=arguments)
    if flags.to not in FORMATS:
        raise ConfigError(f"--to is {flags.to!r}, but it must be one of: {', '.join(FORMATS)}.{suggest(flags.to, FORMATS)}")
    for name in ("head", "rank"):
        if getattr(flags, name) is not None and flags.to != "peft":
            raise ConfigError(f"--{name} is for adapters: it needs --to peft, not --to {flags.to}.")
    from lte_ray import export as exporting

    if flags.to == "peft":
        written = exporting.peft_adapter(flags.run, flags.out, flags.head, flags.version, flags.rank, worker=flags.worker)
    else:
        write = exporting.save_pretrained if flags.to == "pretrained" else exporting.safetensors
        written = write(flags.run, flags.out, flags.version, worker=flags.worker)
    console = Console(highlight=False)
    console.print(f"{flags.out}: {written.summary}.", markup=False, soft_wrap=True)
