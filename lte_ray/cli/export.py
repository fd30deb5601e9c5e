"""``lte-ray export``: exports a model from a run directory. Starts no Ray."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from lte_ray.cli.call import JSON_HELP, print_json
from lte_ray.cli.run_argument import RUN_HELP, STORAGE_HELP, run_path
from lte_ray.cli.settings_parser import parse_arguments, positional, required
from lte_ray.config.validation import setting
from lte_ray.errors import ConfigError
from lte_ray.redaction import without_credentials


@dataclass(frozen=True)
class Flags:
    """Exports a model from a run: its merged weights (safetensors, or a transformers folder), or a change as a LoRA adapter for
    PEFT."""

    run: str = positional("RUN", RUN_HELP)
    out: str = positional("OUT", "A folder that doesn't exist yet (with --to safetensors also a file, X.safetensors).")
    to: Literal["safetensors", "pretrained", "peft"] = required("Format: safetensors, pretrained or peft.")
    version: int | None = setting(None, "Version of the checkpoint; by default the newest.")
    head: int | None = setting(
        None,
        "Export this head's weights instead of the merged ones; with --to peft its change relative to the merged weights. "
        "Needed after --never-merge.",
    )
    rank: int | None = setting(
        None, "With --to peft: maximum rank of a weight's change; by default the rank of the exact change."
    )
    dtype: str = setting("auto", "Type of the merged weights: auto (each weight's own in the model), fp32, bf16 or fp16.")
    ema: bool = setting(False, "Export the moving average of the merged weights instead, of a run that was trained with --ema.")
    worker: str | None = setting(
        None,
        "The worker, by name, module:Class or file.py:Class, instead of the one in run.toml.",
    )
    storage: str | None = setting(None, STORAGE_HELP)
    json: bool = setting(False, JSON_HELP)


def export(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``export``.

    Raises:
        UserError: as the functions of `lte_ray.export`, and for flags that contradict each other.
    """
    flags = parse_arguments(Flags, "lte-ray export RUN OUT --to FORMAT [flags]", arguments)
    if flags.rank is not None and flags.to != "peft":
        raise ConfigError(f"--rank is for adapters: it needs --to peft, not --to {flags.to}.")
    if flags.dtype != "auto" and flags.to == "peft":
        raise ConfigError(f"--dtype {flags.dtype} is for merged weights: adapters are fp32. Leave it out.")
    from lte_ray import export as exporting

    run = run_path(flags.run, flags.storage)
    if flags.to == "peft":
        written = exporting.peft_adapter(
            run, flags.out, flags.head, flags.version, flags.rank, worker=flags.worker, ema=flags.ema
        )
    else:
        write = exporting.save_pretrained if flags.to == "pretrained" else exporting.safetensors
        written = write(run, flags.out, flags.version, head=flags.head, dtype=flags.dtype, worker=flags.worker, ema=flags.ema)
    if flags.json:
        print_json({**dataclasses.asdict(written), "out": flags.out, "run": without_credentials(run)})
        return
    Console(highlight=False).print(f"{flags.out}: {written.summary}.", markup=False, soft_wrap=True)
