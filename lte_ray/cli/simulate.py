"""``lte-ray simulate``: simulates a run on a cluster under a virtual clock. Starts no Ray."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lte_ray.cli.call import print_json
from lte_ray.cli.flags import SECTION_TITLES, Subcommand, parse_sections
from lte_ray.cli.settings_parser import with_constant
from lte_ray.cli.worker_argument import make_without_settings, read_worker
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.config.validation import check_booleans, check_choice, setting
from lte_ray.errors import ConfigError

if TYPE_CHECKING:
    from lte_ray.simulation import SimulationRecord

STDOUT = "-"

SHAPES = ("gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m")
MAX_WIDTH = 110
"""Columns of the timeline on a terminal, at most."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What is simulated, and where the record is written."""

    shapes: str = setting("gpt2-124m", f"Without a WORKER: the model shapes to simulate: {', '.join(SHAPES)}.")
    time_only: bool = setting(False, "With a WORKER: simulate only the time, and train nothing. Without one this is always so.")
    json: str = with_constant("", "File for the record, as JSON; without a FILE it is printed instead of the summary.", STDOUT)
    picture: str = setting("", "File for the timeline, as SVG; or X.html for a page with curves, as of lte-ray report.")

    def __post_init__(self) -> None:
        check_choice(self, "shapes", SHAPES)
        check_booleans(self, "time_only")
        for name in ("json", "picture"):
            file = getattr(self, name)
            if file and file != STDOUT and not Path(file).parent.is_dir():
                raise ConfigError(f"--{name} is {file}, but there is no folder {Path(file).parent}.")


SIMULATE = Subcommand(
    "simulate",
    "Simulates a run on a cluster with the given speeds, links and failures. It needs no cluster. With a WORKER the gradient "
    "steps are real and the time is virtual. Without one, or with --time-only, only the time is simulated, for up to 10,000 "
    "heads.",
    {
        **{kind: title for kind, title in SECTION_TITLES.items() if kind in (LTEConfig, MergeConfig, TrainConfig)},
        ClusterModel: "cluster",
        Output: "output",
    },
    (
        "num_heads",
        "steps",
        "merge_iter",
        "when",
        "wait",
        "speeds",
        "step_seconds",
        "bandwidth",
        "shapes",
        "time_only",
        "picture",
        "json",
    ),
)


def simulate(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``simulate``.

    Raises:
        LTEError: as a run's, for settings that contradict each other, and for files that can't be written.
    """
    program, kind, rest = read_worker(arguments, "simulate", required=False)
    sections, worker = parse_sections(kind, program or "[WORKER]", rest, SIMULATE)
    if kind is not None and worker is None:
        worker = make_without_settings(program, kind)
    if (worker is None or sections[Output].time_only) and sections[MergeConfig].policy == "auto":  # nothing is trained
        sections[MergeConfig] = dataclasses.replace(sections[MergeConfig], policy="average")
    started = time.perf_counter()
    run = _run(worker, sections)
    took = time.perf_counter() - started
    output: Output = sections[Output]
    if output.json:
        what = {
            "program": program or output.shapes,
            "settings": {k.__name__: _plain(s) for k, s in sections.items() if k is not Output},
        }
        if output.json == STDOUT:
            print_json(run.to_json(**what))
        else:
            _write(output.json, json.dumps(run.to_json(**what), allow_nan=False) + "\n")
    if output.picture:
        _write(output.picture, _draw(run, program or output.shapes, sections, dict(_lines(run, took, worker is not None))))
    if output.json != STDOUT:
        _show(run, _title(program or output.shapes, sections), took, worker is not None)


def _run(worker: Any, sections: dict[type, Any]) -> SimulationRecord:
    from lte_ray.engine.prepare import prepare
    from lte_ray.engine.settings import Settings
    from lte_ray.simulation import named_plan, simulate_time, simulate_training

    lte, output, cluster = sections[LTEConfig], sections[Output], sections[ClusterModel]
    settings = Settings("simulated", lte, sections[MergeConfig], sections[TrainConfig]).resolved()
    settings.train.check_runs_to_end("a simulated run takes all its steps, without a driver")
    if worker is None:
        settings.train.check_counts_steps("nothing is trained without a WORKER")
        plan = named_plan(output.shapes, lte.lora_r, lte.lora_alpha)
        return simulate_time(
            [plan.full_rank() if settings.lte.full_rank or not settings.lte.adapt else plan], settings, cluster
        )
    if output.time_only:
        initial = prepare(worker, settings)
        return simulate_time(list(initial.plans), initial.complete(settings), cluster)
    return simulate_training(worker, settings, cluster).record


def _draw(run: SimulationRecord, what: str, sections: dict[type, Any], facts: dict[str, str]) -> str:
    """The picture: a page, or the timeline alone as SVG."""
    if sections[Output].picture.lower().endswith((".html", ".htm")):
        from lte_ray.report.simulated import render_simulation

        fields = (_plain(section).items() for kind, section in sections.items() if kind is not Output)
        return render_simulation(run, _title(what, sections), facts, {name: str(v) for each in fields for name, v in each})
    from lte_ray.cli.timeline import svg

    return svg(run, _title(what, sections))


def _plain(section: Any) -> dict[str, Any]:
    """A settings class as JSON values; other objects as text."""
    return json.loads(json.dumps(dataclasses.asdict(section), default=str))  # type: ignore[no-any-return]


def _write(file: str, content: str) -> None:
    try:
        Path(file).write_text(content)
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}.") from error


def _title(what: str, sections: dict[type, Any]) -> str:
    merge: MergeConfig = sections[MergeConfig]
    every = f"every {merge.merge_every}" if merge.merge_every else f"every {merge.merge_iter} steps"
    every = f"schedule {merge.merge_schedule}" if merge.merge_schedule else every
    waiting = "" if merge.wait else ", no waiting"
    policy = merge.policy if isinstance(merge.policy, str) else type(merge.policy).__name__
    return f"{what}: {policy}, {merge.when}{waiting}, {every}"


def _show(run: SimulationRecord, title: str, took: float, with_samples: bool) -> None:
    """Prints the summary and the timeline."""
    from lte_ray.cli.timeline import timeline

    console = Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", justify="right")
    grid.add_column()
    for name, value in run.evaluation.items():
        grid.add_row(Text(name.replace("_", " ")), Text(f"{value:.4g}", style="bold green"))
    for name, text in _lines(run, took, with_samples):
        grid.add_row(name, text)
    console.print(Panel(grid, title=Text(title), title_align="left", expand=False))
    fancy = (console.encoding or "").lower().startswith("utf")
    console.print(timeline(run, min(MAX_WIDTH, console.width), unicode=fancy), soft_wrap=True)


def _lines(run: SimulationRecord, took: float, with_samples: bool) -> Iterator[tuple[str, str]]:
    from lte_ray.run.display import format_bytes
    from lte_ray.simulation import KINDS

    if with_samples and run.merges and math.isfinite(run.merges[-1].loss):
        yield "train loss", f"{run.merges[-1].loss:.4g}, from {run.merges[0].loss:.4g} in the first merge"
    each = [head.utilisation for head in run.heads]
    yield "utilisation", f"{run.utilisation:.1%} of a head's time; {min(each):.1%} to {max(each):.1%}"
    yield "heads' time", ", ".join(f"{kind} {run.share(kind):.1%}" for kind in KINDS if run.share(kind) >= 0.0005)
    yield "took", f"{run.seconds:,.4g} s, simulated in {took:.1f} s"
    samples = f", {run.samples:,} samples" if with_samples else ""
    lost = f"; {run.lost_steps:,} more were lost" if run.lost_steps else ""
    yield "trained", f"{run.steps:,} local steps{samples}{lost}"
    rate = f"{run.versions / run.seconds:.3g} a second" if run.seconds else "at once"
    yield "merges", f"{run.versions:,}, {rate}; of {run.arrivals:,} contributions"
    yield "staleness", f"{run.mean_lag:.2f} versions on average, {run.max_lag} at most"
    of = max(1, run.arrivals)
    yield "bytes", f"{format_bytes(run.bytes_up / of)} up and {format_bytes(run.bytes_down / of)} down for each contribution"
    yield "in all", f"{format_bytes(run.bytes_up)} up and {format_bytes(run.bytes_down)} down"
    yield (
        "coordinator",
        (f"busy {run.coordinator_busy:.1%} of the time, its link {run.link_in_busy:.1%} in, {run.link_out_busy:.1%} out"),
    )
