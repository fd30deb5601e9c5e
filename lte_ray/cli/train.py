"""``lte-ray train``: loads the worker, trains it, and shows a summary."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lte_ray.cli.flags import Parsed, parse
from lte_ray.cli.toml_config import from_content
from lte_ray.cli.worker_argument import check_class, make_without_settings, read_worker
from lte_ray.config import check_run_name
from lte_ray.import_object import load_worker
from lte_ray.redaction import without_credentials

if TYPE_CHECKING:
    import ray.train


def train(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``train``.

    Raises:
        LTEError: as `LTETrainer.fit`, and for a worker that can't be loaded.
    """
    named = _named_run(arguments)
    if named is not None:
        _show(_train_again(*named))
        return
    worker = read_worker(arguments, "train")
    parsed = parse(worker.kind, worker.program or "WORKER", worker.flags)
    assert worker.kind is not None  # the help has ended the program
    _show(_fit(worker.program, worker.kind, parsed))


def _named_run(arguments: list[str]) -> tuple[str, list[str]] | None:
    """The run that ``--resume NAME`` names, and the other flags. None after a WORKER, where ``--resume`` is a switch."""
    if not arguments or not arguments[0].startswith("-") or "--resume" not in arguments:
        return None
    at = arguments.index("--resume")
    if at + 1 == len(arguments) or arguments[at + 1].startswith("-"):
        return None
    return arguments[at + 1], arguments[:at] + arguments[at + 2 :]


def _train_again(name: str, flags: list[str]) -> ray.train.Result:
    """Continues a run with the settings in its ``run.toml``; flags win over them."""
    from lte_ray.run import record as run_record
    from lte_ray.storage import RUN, RunDirectory
    from lte_ray.trainer import default_storage

    check_run_name(name, "--resume")
    place = next((value for flag, value in pairwise([*flags, ""]) if flag == "--storage"), None)
    place = place or next((f.partition("=")[2] for f in flags if f.startswith("--storage=")), None) or default_storage()
    record = run_record.read(RunDirectory.open(place, name))
    console = Console(stderr=True, highlight=False)
    console.print(Text(f"{record.directory.display} continues with {record.program}, as its {RUN} says."))
    worker = load_worker(record.program, what=f"The worker that {RUN} names,")
    kind = check_class(worker, f"{record.program!r}, which {RUN} names,")
    file = from_content(record.path, record.content)
    file.content.update(storage=place)
    return _fit(record.program, kind, parse(kind, record.program, [*flags, "--name", name, "--resume"], file))


def _fit(program: str, kind: type, parsed: Parsed) -> ray.train.Result:
    from lte_ray.trainer import LTETrainer

    trainer = LTETrainer(
        parsed.worker if parsed.worker is not None else make_without_settings(program, kind),
        lte=parsed.lte,
        merge=parsed.merge,
        train=parsed.train,
        scaling_config=parsed.placement,
        failure=parsed.failure,
        run_config=parsed.storage,
        program=program,
    )
    return trainer.fit()


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
        grid.add_row("trained", f"{m['step']} local steps a head, {m['samples']:,} samples{rate}, {m['version']} merges")
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
    if "sample" in m:
        console.print(Panel(Text(m["sample"]), title="sample", title_align="left", expand=False))
