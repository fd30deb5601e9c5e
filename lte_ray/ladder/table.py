"""The table of a ladder, for a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from lte_ray.ladder.rungs import ORDINARY
from lte_ray.ladder.summary import Summary
from lte_ray.run.display import format_bytes, format_duration


def make_cells(summaries: Sequence[Summary]) -> list[list[str]]:
    """Returns the header and a row for each rung."""
    header = ["rung", "rate", summaries[0].figure.name, "ratio", "samples", "sent", "time"]
    cells = ((s.name, _rate(s), _mean(s), _ratio(s), _samples(s), _sent(s), format_duration(s.seconds)) for s in summaries)
    return [header, *map(list, cells)]


def explain(summaries: Sequence[Summary], optimizers: Mapping[str, str]) -> list[str]:
    """Returns what the columns mean and how the comparison was made, in sentences.

    Args:
        optimizers: name of the optimizer, by rung.
    """
    figure, seeds = summaries[0].figure, list(summaries[0].result.best)
    better = "higher" if figure.higher_is_better else "lower"
    of_seeds = f" of seeds {', '.join(map(str, seeds))}, mean and standard deviation" if len(seeds) > 1 else ""
    lines = [f"{figure.name}: at the end, on merged weights{of_seeds}; {better} is better."]
    if any(s.name == ORDINARY for s in summaries):
        lines.append("ratio: to ordinary training. samples: until its final figure is reached, as a multiple of its samples.")
    if any(s.sent for s in summaries):
        lines.append("sent: by and to one head, and relative to data-parallel training of all weights (the row ordinary).")
    lines += [_optimizers(optimizers), tuning(summaries)]
    if any(s.result.edge for s in summaries):
        lines.append("*: the lowest or highest rate that was tried.")
    return lines


def tuning(summaries: Sequence[Summary]) -> str:
    """Returns which rates were tried, in a sentence: a comparison in which only some were tuned must say so."""
    swept = {s.name: tuple(s.result.sweep) for s in summaries}
    seed = next(iter(summaries[0].result.sweep.values())).seed
    if all(len(rates) == 1 for rates in swept.values()):
        return "rate: no rate was tuned (--rates), so a rung may be behind only because its rate suits it less."
    if len(set(swept.values())) == 1:
        return f"rate: the best of {_rates(next(iter(swept.values())))} on seed {seed}, for every rung."
    parts = (f"{name} {_rates(rates)}" if len(rates) > 1 else f"{name} not tuned" for name, rates in swept.items())
    return f"rate: the best on seed {seed} of those tried: {'; '.join(parts)}."


def _optimizers(optimizers: Mapping[str, str]) -> str:
    rungs: dict[str, list[str]] = {}
    for rung, name in optimizers.items():
        rungs.setdefault(name, []).append(rung)
    if len(rungs) == 1:
        return f"optimizer: {next(iter(rungs))}, for every rung."
    parts = (f"{name} for {', '.join(of)}" for name, of in rungs.items())
    return f"optimizer: {'; '.join(parts)}."


def make_table(summaries: Sequence[Summary], title: str) -> Table:
    """Returns the table for a terminal, 80 columns wide or less for short names."""
    header, *rows = make_cells(summaries)
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(header):  # only a long name of a figure may be folded
        width = max(len(row[index]) for row in rows)
        table.add_column(name, justify="right" if index else "left", min_width=width, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def make_markdown(
    summaries: Sequence[Summary], title: str, explanation: Sequence[str], advice: Sequence[str], picture: str = ""
) -> str:
    """Returns the table, the explanation and the advice as Markdown.

    Args:
        explanation: what `explain` returned.
        advice: what `advise` returned.
        picture: the file of the picture, if there is one.
    """
    header, *rows = make_cells(summaries)
    lines = [f"# {title}", "", _markdown_row(header), _markdown_row(["---"] + ["---:"] * (len(header) - 1))]
    lines += [_markdown_row(row) for row in rows]
    lines += ["", *(f"- {line}" for line in explanation), ""]
    if picture:
        lines += [f"![{summaries[0].figure.name} against samples]({picture})", ""]
    lines += [f"{line}\n" for line in advice]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _rate(s: Summary) -> str:
    return f"x{s.result.rate:g}{'*' if s.result.edge else ''}"


def _mean(s: Summary) -> str:
    if not math.isfinite(s.mean):
        return "diverged"
    return f"{s.mean:.4g}" + (f" ± {s.spread:.2g}" if math.isfinite(s.spread) else "")


def _ratio(s: Summary) -> str:
    return f"{s.ratio:.3f}" if math.isfinite(s.ratio) else "-"


def _samples(s: Summary) -> str:
    if math.isnan(s.reached):
        return "-"
    return f"{s.reached:.2f}x" if math.isfinite(s.reached) else "> 1x"


def _sent(s: Summary) -> str:
    if s.name == ORDINARY:
        return format_bytes(s.ddp) if s.ddp else "-"
    if not s.sent:
        return "-"
    return f"{format_bytes(s.sent)} ({_fraction(s.sent / s.ddp)})" if s.ddp else format_bytes(s.sent)


def _fraction(part: float) -> str:
    """``1/24`` of something, or ``2.1x`` above it."""
    return f"1/{1 / part:.0f}" if part < 0.67 else f"{part:.1f}x"


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(f"x{rate:g}" for rate in rates)
