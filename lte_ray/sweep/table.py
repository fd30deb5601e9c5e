"""The result of a sweep: its configurations, best first, as a table for a terminal and as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from lte_ray.ladder import Figure
from lte_ray.run.display import format_bytes, format_duration
from lte_ray.sweep.trials import TrialResult, describe


@dataclass(frozen=True)
class Configuration:
    """A configuration and its trials, one for each seed.

    Attributes:
        trials: that have a result, the first seed's first.
        mean, spread: of the figure at the end; the spread is the standard deviation, NaN for one seed. NaN if none was trained
            to its end; then `mean` is the figure when it was stopped.
        finished: trials that were trained to their end.
    """

    trials: tuple[TrialResult, ...]
    mean: float
    spread: float
    finished: int

    @property
    def first(self) -> TrialResult:
        return self.trials[0]

    @property
    def outcome(self) -> str:
        """What kept it from its end; empty if nothing did."""
        return next((each.failed or each.stopped for each in self.trials if not each.is_finished), "")


def rank(results: Sequence[TrialResult], figure: Figure) -> list[Configuration]:
    """Returns the configurations, best first.

    Those with more seeds come first, since the others were worse on the first one; those that were stopped or failed come last,
    the longer they were trained, the earlier.
    """
    by_number: dict[int, list[TrialResult]] = {}
    for result in results:
        by_number.setdefault(result.number, []).append(result)
    configurations = [_summarize(trials, figure) for trials in by_number.values()]
    return sorted(
        configurations,
        key=lambda c: (-c.finished, bool(c.first.failed), -c.first.samples if c.outcome else 0, figure.cost(c.mean)),
    )


def _summarize(trials: list[TrialResult], figure: Figure) -> Configuration:
    finished = [each.last(figure.name) for each in trials if each.is_finished]
    values = finished or [trials[0].last(figure.name)]
    spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return Configuration(tuple(trials), statistics.fmean(values), spread, len(finished))


def make_cells(ranked: Sequence[Configuration], figure: Figure) -> list[list[str]]:
    """Returns the header and a row for each configuration."""
    flags = list(ranked[0].first.values)
    header = ["trial", *flags, figure.name.replace("_", " "), "samples", "sent", "time", ""]
    return [header, *(_row(each, flags) for each in ranked)]


def _row(each: Configuration, flags: list[str]) -> list[str]:
    first = each.first
    mean = f"{each.mean:.4g}" if math.isfinite(each.mean) else "-"
    spread = f" ± {each.spread:.2g}" if math.isfinite(each.spread) else ""
    state = (
        "failed" if first.failed else "stopped" if first.stopped else f"{each.finished} seeds" if len(each.trials) > 1 else ""
    )
    return [
        f"{first.number:03d}",
        *(first.values[flag] for flag in flags),
        mean + spread,
        f"{first.samples:,}" if first.samples else "-",
        format_bytes(first.sent) if first.sent else "-",
        format_duration(sum(trial.seconds for trial in each.trials)),
        state,
    ]


def make_table(ranked: Sequence[Configuration], figure: Figure, title: str) -> Table:
    """Returns the table for a terminal."""
    header, *rows = make_cells(ranked, figure)
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in header:
        table.add_column(name, justify="left" if name in ("trial", "") else "right", overflow="fold")
    for number, row in enumerate(rows):
        style = "bold green" if number == 0 and ranked[0].finished else "dim" if ranked[number].outcome else ""
        table.add_row(*map(Text, row), style=style)
    return table


def explain(ranked: Sequence[Configuration], figure: Figure, seeds: Sequence[int]) -> list[str]:
    """Returns what the table means, in sentences."""
    better = "higher" if figure.higher_is_better else "lower"
    lines = [f"{figure.name}: of the last evaluation, on merged weights; {better} is better."]
    if len(seeds) > 1:
        finalists = sum(each.finished > 1 for each in ranked)
        lines.append(
            f"All configurations were trained with seed {seeds[0]}, the best {finalists} with all seeds: "
            f"{', '.join(map(str, seeds))}. Theirs are mean and standard deviation."
        )
    stopped = sum(bool(each.first.stopped) for each in ranked)
    if stopped:
        lines.append(f"stopped: {stopped} ended early, since others were better after as many samples.")
    lines += [
        f"{each.first.name} ({describe(each.first.values)}) failed: {each.outcome}" for each in ranked if each.first.failed
    ]
    return lines


def make_markdown(ranked: Sequence[Configuration], figure: Figure, title: str, text: Sequence[str], command: str) -> str:
    """Returns the table, its explanation and the command of the best configuration as Markdown."""
    header, *rows = make_cells(ranked, figure)
    lines = [f"# {title}", "", _markdown_row(header), _markdown_row(["---", *["---:"] * (len(header) - 1)])]
    lines += [*(_markdown_row(row) for row in rows), "", *(f"- {line}" for line in text), ""]
    if command:
        lines += ["The best configuration:", "", "```sh", command, "```", ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
