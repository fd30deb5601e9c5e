"""``lte-ray train`` and ``resume``: load the worker, train it, and show a summary."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lte_ray.cli.call import CallOptions, print_json
from lte_ray.cli.flags import HELP, HELP_ALL, RESUME, Parsed, parse
from lte_ray.cli.run_argument import locate_run, run_path
from lte_ray.cli.settings_parser import normalize
from lte_ray.cli.toml_config import from_content
from lte_ray.cli.worker_argument import check_class, make_without_settings, read_worker
from lte_ray.config import TrainConfig
from lte_ray.errors import RESUMABLE, ConfigError
from lte_ray.import_object import load_worker
from lte_ray.redaction import without_credentials

if TYPE_CHECKING:
    import ray.train

log = logging.getLogger("lte_ray")


def train(arguments: list[str]) -> int:
    """Runs the subcommand with the arguments after ``train``, and returns the exit code.

    Raises:
        LTEError: as `LTETrainer.fit`, and for a worker that can't be loaded.
    """
    named = named_run(arguments)
    if named is not None:
        return resume([*named])
    worker = read_worker(arguments, "train")
    parsed = parse(worker.kind, worker.program or "WORKER", worker.flags)
    assert worker.kind is not None  # the help has ended the program
    return _run(worker.program, worker.kind, parsed)


def named_run(arguments: list[str]) -> list[str] | None:
    """RUN of ``--resume RUN`` and the other flags. None after a WORKER, where ``--resume`` is a switch."""
    if not arguments or not arguments[0].startswith("-") or "--resume" not in arguments:
        return None
    at = arguments.index("--resume")
    if at + 1 == len(arguments) or arguments[at + 1].startswith("-"):
        return None
    return [arguments[at + 1], *arguments[:at], *arguments[at + 2 :]]


def resume(arguments: list[str]) -> int:
    """Continues a run with the settings in its ``run.toml``; flags win over them. The first argument is the run.

    Raises:
        LTEError: as `train`, and for a run that doesn't exist.
    """
    if not arguments or arguments[0].startswith("-"):
        if {*HELP, HELP_ALL} & set(arguments):
            parse(None, "RUN", arguments, subcommand=RESUME)
        raise ConfigError("lte-ray resume needs a RUN first: lte-ray resume RUN [flags]. It is a path, a URI or a name.")
    run, *flags = normalize(arguments)
    if {*HELP, HELP_ALL} & set(flags):
        parse(None, run, flags, subcommand=RESUME)
    from lte_ray.run import run_toml
    from lte_ray.storage import RUN, RunDirectory

    storage, rest = _take_value("--storage", flags)
    place, name = locate_run(run, storage)
    record = run_toml.read(RunDirectory.open(place, name))
    worker = load_worker(record.program, what=f"The worker that {RUN} names,")
    kind = check_class(worker, f"{record.program!r}, which {RUN} names,")
    file = from_content(record.path, record.content)
    file.content.update(storage=place)
    parsed = parse(kind, record.program, [*rest, "--name", name, "--resume"], file)
    note = f"{record.directory.display} continues with {record.program}, as its {RUN} says."
    return _run(record.program, kind, parsed, note)


def _take_value(flag: str, flags: list[str]) -> tuple[str | None, list[str]]:
    """The last value of a flag, and the other flags."""
    value, rest, remaining = None, [], iter(flags)
    for each in remaining:
        if each == flag:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{flag} needs a value.")
        elif each.startswith(f"{flag}="):
            value = each.partition("=")[2]
        else:
            rest.append(each)
    return value, rest


def _run(program: str, kind: type, parsed: Parsed, note: str = "") -> int:
    """Trains, reports the result, and returns the exit code."""
    from lte_ray.run.metrics import SilentReporter

    with parsed.call.running():
        if note:
            log.info(note)
        from lte_ray.trainer import LTETrainer

        trainer = LTETrainer(
            parsed.worker if parsed.worker is not None else make_without_settings(program, kind),
            lte=parsed.lte,
            merge=parsed.merge,
            train=with_run(parsed.train, parsed.storage.storage),
            scaling_config=parsed.placement,
            failure=parsed.failure,
            run_config=parsed.storage,
            program=program,
            reporter=SilentReporter() if parsed.call.quiet else None,
        )
        result = trainer.fit()
    return _report(result, parsed.call)


def with_run(train: TrainConfig, storage: str | None) -> TrainConfig:
    """Returns the settings with the path of the run that ``--init-from`` names, if it is a name and there is such a run."""
    from lte_ray.storage import RUN, RunDirectory, split_run_path

    given = train.init_from
    if not given or Path(given).expanduser().exists() or "/" in given or os.sep in given:
        return train
    path = run_path(given, storage)
    return dataclasses.replace(train, init_from=path) if RunDirectory.open(*split_run_path(path)).exists(RUN) else train


def _report(result: ray.train.Result, call: CallOptions) -> int:
    """Prints the result, and returns the exit code."""
    metrics: dict[str, Any] = result.metrics or {}
    stopped = metrics.get("stopped") or {}
    code = RESUMABLE if stopped.get("kind") == "max-time" else 0
    if call.json:
        place = without_credentials(str(result.path))
        checkpoint = None if result.checkpoint is None else without_credentials(str(result.checkpoint.path))
        print_json({**metrics, "run": place, "checkpoint": checkpoint, "exit_code": code})
    else:
        _show(result)
    return code


def _show(result: ray.train.Result) -> None:
    """Prints the final summary, and the worker's sample if it gives one."""
    from lte_ray.run.display import format_bytes

    console = Console(highlight=False)
    m: dict[str, Any] = result.metrics or {}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", justify="right")
    grid.add_column()
    for name, value in m["evaluation"].items():
        grid.add_row(Text(name.replace("_", " ")), Text(f"{value:.4g}", style="bold green"))
    if math.isfinite(m["train_loss"]):
        grid.add_row("train loss", f"{m['train_loss']:.4g}")
    rate = f", {m['samples_per_second']:,.1f} samples/s" if m["samples_per_second"] else ""
    if m["baseline"]:
        grid.add_row("trained", f"{m['step']} steps of ordinary training (baseline), {m['samples']:,} samples{rate}")
    else:
        versions = "versions; nothing is merged" if m["independent"] else "merges"
        grid.add_row("trained", f"{m['step']} local steps a head, {m['samples']:,} samples{rate}, {m['version']} {versions}")
    total = sum(m["times"].values()) or 1.0
    shares = ", ".join(f"{name} {100 * spent / total:.1f}%" for name, spent in m["times"].items() if spent / total >= 0.0005)
    if shares:  # empty if all steps were taken before
        grid.add_row("time" if m["baseline"] else "heads' time", shares)
    if not m["baseline"]:
        up, down, ddp = (format_bytes(m[name]) for name in ("bytes_up", "bytes_down", "bytes_ddp"))
        grid.add_row("traffic", f"{up} up, {down} down; DDP at every step: {ddp}")
    grid.add_row("took", f"{m['seconds']:.0f} s")
    grid.add_row("run", Text(without_credentials(str(result.path))))
    console.print(Panel(grid, title="done", title_align="left", expand=False))
    if m["independent"]:
        run = shlex.quote(without_credentials(str(result.path)))
        console.print(f"Each head has an adapter of its own: lte-ray export {run} OUT --to peft --head N", soft_wrap=True)
    if "sample" in m:
        console.print(Panel(Text(m["sample"]), title="sample", title_align="left", expand=False))
