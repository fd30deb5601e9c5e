"""Progress for people: a live table on a terminal, lines at intervals everywhere else."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
import time
from typing import IO

import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lte_ray.run.metrics import Progress, Reporter

log = logging.getLogger("lte_ray")

MAX_HEADS = 8
"""Heads that are shown one by one. Further ones are summarized."""

LINE_INTERVAL = 5.0
"""Seconds between two lines without a terminal, at least."""

UNCHANGED_INTERVAL = 300.0
"""Seconds after which a line is printed although nothing has changed, to show that the run is on."""

TIME = "%H:%M:%S"


def automatic_display(stream: IO[str] | None = None) -> Reporter:
    """A live display if the output is a terminal, else lines.

    Args:
        stream: the output; by default stderr.
    """
    console = rich.console.Console(file=stream, stderr=stream is None, highlight=False)
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


class LineDisplay:
    """Prints a line with the time for each new evaluation, and every few seconds if something has changed.

    For logs and `ray job submit`. Unless the user's program has set up logging, warnings get the time, too.
    """

    def __init__(self, console: rich.console.Console) -> None:
        self._console, self._printed_at, self._evaluated_version, self._shown = console, -math.inf, -1, ""
        self._handler: logging.Handler | None = None
        if not log.hasHandlers():
            self._handler = TimedHandler(logging.WARNING)
            log.addHandler(self._handler)

    def update(self, progress: Progress) -> None:
        evaluated = progress.evaluation.version if progress.evaluation else -1
        since, shown = time.monotonic() - self._printed_at, _changing(progress)
        due = since >= LINE_INTERVAL and (shown != self._shown or since >= UNCHANGED_INTERVAL)
        if evaluated != self._evaluated_version or due:
            self._printed_at, self._evaluated_version, self._shown = time.monotonic(), evaluated, shown
            self._console.print(f"{time.strftime(TIME)}  {format_line(progress)}", soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._handler is not None:
            log.removeHandler(self._handler)


class TimedHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes messages with the time to what is stderr at that moment, as Python does without any handler."""

    def __init__(self, level: int = logging.NOTSET) -> None:
        super().__init__()
        self.setLevel(level)
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s", TIME))

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


def _changing(p: Progress) -> str:
    """The line without what changes while nothing happens: rates, remaining time, and numbers of seconds in a note."""
    still = dataclasses.replace(p, samples_per_second=None, remaining=None, note=re.sub(r"\d+(\.\d+)? s\b", "", p.note))
    return format_line(still)


class LiveDisplay:
    """A table that is redrawn in place: the run at the top, a row for each head below."""

    def __init__(self, console: rich.console.Console) -> None:
        self._live = Live(console=console, refresh_per_second=4)
        self._live.start()

    def update(self, progress: Progress) -> None:
        self._live.update(make_table(progress))

    def close(self) -> None:
        self._live.stop()


def format_line(p: Progress) -> str:
    """One line of progress."""
    weights = "weights" if p.baseline else "base"
    parts = ["baseline"] * p.baseline + [f"step {p.step}/{p.steps}", f"{weights} v{p.version}"]
    if p.samples_per_second is not None:
        parts.append(f"{p.samples_per_second:,.1f} samples/s")
    if not math.isnan(p.train_loss):
        losses = [h.loss for h in p.heads if not math.isnan(h.loss)]
        shown = " ".join(f"{x:.4f}" for x in losses) if len(losses) <= MAX_HEADS else _format_losses(losses)
        parts.append(f"train loss {shown}")
    if p.evaluation:
        parts.append(f"{format_evaluation(p)} (v{p.evaluation.version})")
    if p.remaining is not None:
        parts.append(f"{format_duration(p.remaining)} left")
    if p.note:
        parts.append(p.note)
    return "  ".join(parts)


def make_table(p: Progress) -> RenderableType:
    """The live display at one moment."""
    top = Table.grid(padding=(0, 2))
    rate = f"{p.samples_per_second:,.1f} samples/s" if p.samples_per_second is not None else ""
    left = f"{format_duration(p.remaining)} left" if p.remaining is not None else ""
    top.add_row(
        Text(p.run + " (baseline: ordinary training)" * p.baseline, style="bold"),
        ProgressBar(total=p.steps, completed=p.step, width=20),
        f"step {p.step}/{p.steps}",
        rate,
        f"{format_duration(p.seconds)} gone",
        left,
    )
    saved = f"checkpoint v{p.checkpoint}" if p.checkpoint is not None else "no checkpoint yet"
    evaluated = f"{format_evaluation(p)} (v{p.evaluation.version})" if p.evaluation else "not evaluated yet"
    middle = Table.grid(padding=(0, 2))
    weights = "weights" if p.baseline else "base"
    middle.add_row(f"{weights} v{p.version}", Text(evaluated, style="bold green"), saved, Text(p.note or p.stalled))
    heads = Table(box=None, padding=(0, 2), header_style="dim")
    for title in ("process" if p.baseline else "head", "step", "samples", "train loss", weights, "state", "device"):
        heads.add_column(title, justify="left" if title in ("state", "device") else "right")
    for h in p.heads[:MAX_HEADS]:
        loss = "-" if math.isnan(h.loss) else f"{h.loss:.4f}"
        state = f"{h.state}, {h.refused} refused" if h.refused else h.state
        heads.add_row(str(h.head), str(h.step), f"{h.samples:,}", loss, f"v{h.version}", state, h.device)
    if len(p.heads) > MAX_HEADS:
        rest = p.heads[MAX_HEADS:]
        losses = [h.loss for h in rest if not math.isnan(h.loss)]
        steps, samples = min(h.step for h in rest), sum(h.samples for h in rest)
        heads.add_row(f"+{len(rest)}", str(steps), f"{samples:,}", _format_losses(losses), "", "", "")
    return Group(top, middle, heads) if p.heads else Group(top, middle)


def _format_losses(losses: list[float]) -> str:
    """The mean and the range: ``0.0190 (0.0184-0.0197)``."""
    return f"{sum(losses) / len(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})" if losses else "-"


def format_evaluation(p: Progress) -> str:
    """The figures of the last evaluation: ``bits_per_byte 2.41``."""
    values = p.evaluation.values if p.evaluation else {}
    return " ".join(f"{name} {value:.4g}" for name, value in values.items()) or "evaluated"


def format_duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_bytes(size: float) -> str:
    """Bytes as ``12.3 MB``, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
