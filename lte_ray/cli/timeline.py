"""A simulation's timeline as text: a row for each head, a column for each slice of time.

A simulation's timeline as an SVG picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from rich.text import Text

from lte_ray.simulation.record import Row, SimulationRecord, Span

ROUNDS = 6
"""Rounds of the slowest head that a picture shows, so that each is wide enough to be seen."""

STYLES = {
    "train": ("█", "#", "green"),
    "send": ("↑", "^", "cyan"),
    "wait": ("·", ".", "bright_black"),
    "fetch": ("↓", "v", "blue"),
    "dead": ("x", "x", "red"),
    "merge": ("M", "M", "magenta"),
    "message": ("m", "m", "bright_black"),
    "adopted": ("│", "|", "bold"),
}
"""What stands for each kind: with Unicode, without, and its colour."""

IDLE = " "


def window(run: SimulationRecord, rounds: int = ROUNDS) -> float:
    """The seconds of the run that a picture shows: from its start, about so many rounds of the slowest head."""
    longest = max((head.ended / head.contributions for head in run.heads if head.contributions), default=run.seconds)
    return min(run.seconds, rounds * longest) or 1.0


def timeline(run: SimulationRecord, width: int, *, unicode: bool = True) -> Text:
    """One line for each row, a ruler, and what the characters mean.

    A column shows what the row was busy with for most of that slice of time.

    Args:
        width: columns in all.
        unicode: whether characters beyond ASCII may be used.
    """
    until = window(run)
    names = max(len(row.name) for row in run.rows)
    columns = max(10, width - names - 1)
    text = Text(no_wrap=True, overflow="crop")
    seen = []
    for row in run.rows:
        text.append(f"{row.name:>{names}} ")
        marks = _marks(row, until, columns)
        for column, kind in enumerate(slices(row, until, columns)):
            if kind == "train" and column in marks:
                seen.append("adopted")
                text.append("│" if unicode else "|", style="bold")
                continue
            if kind is None:
                text.append(IDLE)
                continue
            seen.append(kind)
            fine, plain, colour = STYLES[kind]
            text.append(fine if unicode else plain, style=colour)
        text.append("\n")
    end = f"{until:,.4g} s" + (f" of {run.seconds:,.4g} s" if until < run.seconds else "")
    text.append(" " * (names + 1) + "0" + end.rjust(columns - 1) + "\n", style="dim")
    text.append(" " * (names + 1))
    for kind, (fine, plain, colour) in STYLES.items():
        if kind in seen:
            text.append(fine if unicode else plain, style=colour)
            text.append(f" {kind if kind != 'adopted' else 'newer base adopted while training'}   ")
    return text


def slices(row: Row, until: float, count: int) -> list[str | None]:
    """What fills most of each of `count` equal slices of [0, `until`); None where the row was idle for most of it."""
    step = until / count
    found: list[str | None] = []
    first = 0
    for index in range(count):
        begin, end = index * step, (index + 1) * step
        while first < len(row.spans) and row.spans[first].end <= begin:
            first += 1
        found.append(_most(row.spans, first, begin, end))
    return found


def _marks(row: Row, until: float, count: int) -> set[int]:
    """The slices in which a newer base was adopted; none where they are too many to be told apart."""
    marks = {int(at / until * count) for at in row.adopted if at < until}
    return marks if len(marks) <= count // 4 else set()


def _most(spans: Sequence[Span], first: int, begin: float, end: float) -> str | None:
    shares: dict[str | None, float] = {}
    for span in spans[first:]:
        if span.start >= end:
            break
        shares[span.kind] = shares.get(span.kind, 0.0) + min(span.end, end) - max(span.start, begin)
    shares[None] = (end - begin) - sum(shares.values())
    return max(shares, key=lambda kind: shares[kind])


COLOURS = {
    "train": "#3a9d5d",
    "send": "#2aa5b8",
    "wait": "#d9d9d9",
    "fetch": "#3b6fc4",
    "dead": "#d64545",
    "merge": "#9b4fb5",
    "message": "#d3b3de",
}
"""Fill of each kind. They differ in lightness, too."""

LEFT, TOP, WIDTH, ROW, GAP, NARROWEST = 90, 48, 900, 20, 6, 0.25


def svg(run: SimulationRecord, title: str) -> str:
    """The picture: a bar for each row, a tick where a newer base was adopted while training, a ruler and a legend.

    Shows the run's first rounds, as the text does; spans narrower than a quarter of a pixel are joined to their neighbour.
    """
    until = window(run)
    scale = WIDTH / until
    height = TOP + len(run.rows) * (ROW + GAP) + 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{LEFT + WIDTH + 20}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{LEFT}" y="39" fill="#666666">{escape(_figures(run))}</text>',
    ]
    for index, row in enumerate(run.rows):
        y = TOP + index * (ROW + GAP)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(row.name)}</text>')
        parts += _bars(row, y, until, scale)
    bottom = TOP + len(run.rows) * (ROW + GAP)
    for tick in range(6):
        x, at = LEFT + WIDTH * tick / 5, until * tick / 5
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#000000" stroke-opacity="0.12"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#666666">{at:.4g} s</text>')
    x = float(LEFT)
    for kind in [kind for kind in COLOURS if any(span.kind == kind for row in run.rows for span in row.spans)]:
        parts.append(f'<rect x="{x}" y="{bottom + 28}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 17}" y="{bottom + 38}">{kind}</text>')
        x += 90
    if any(row.adopted for row in run.rows):
        parts.append(f'<line x1="{x + 5}" y1="{bottom + 26}" x2="{x + 5}" y2="{bottom + 42}" stroke="#000000"/>')
        parts.append(f'<text x="{x + 17}" y="{bottom + 38}">newer base adopted</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _figures(run: SimulationRecord) -> str:
    return (
        f"{len(run.heads)} heads, {run.versions} merges in {run.seconds:,.4g} s, utilisation {100 * run.utilisation:.1f}%, "
        f"mean staleness {run.mean_lag:.2f} versions"
    )


def _bars(row: Row, y: int, until: float, scale: float) -> list[str]:
    parts = []
    for span in row.spans:
        width = (min(span.end, until) - span.start) * scale
        if width >= NARROWEST:
            parts.append(
                f'<rect x="{LEFT + span.start * scale:.2f}" y="{y}" width="{width:.2f}" height="{ROW}" '
                f'fill="{COLOURS[span.kind]}"><title>{span.kind} {span.start:.4g} - {span.end:.4g} s</title></rect>'
            )
    for at in row.adopted:
        if at < until:
            x = LEFT + at * scale
            parts.append(f'<line x1="{x:.2f}" y1="{y - 2}" x2="{x:.2f}" y2="{y + ROW + 2}" stroke="#000000"/>')
    return parts
