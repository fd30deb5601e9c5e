"""The timeline of a simulation: a row for each head, as text for a terminal (`timeline`) or as an SVG picture (`svg`).

Both show only the first rounds, so that each is wide enough to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from rich.text import Text

from lte_ray.simulation.record import Row, SimulationRecord, Span

ROUNDS = 6
"""Rounds of the slowest head that a timeline shows."""

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
"""The character of each kind of span with Unicode and without, and its style."""

IDLE = " "

COLORS = {
    "train": "#3a9d5d",
    "send": "#2aa5b8",
    "wait": "#d9d9d9",
    "fetch": "#3b6fc4",
    "dead": "#d64545",
    "merge": "#9b4fb5",
    "message": "#d3b3de",
}
"""Fill of each kind. They differ in lightness, too."""

LEFT, TOP, WIDTH, ROW_HEIGHT, GAP = 90, 48, 900, 20, 6
"""Pixels of the picture: margins, width of the rows, and their height and distance."""

MIN_SPAN_WIDTH = 0.25
"""Pixels below which a span isn't drawn, so that the picture of many short spans stays small."""


def shown_seconds(run: SimulationRecord, rounds: int = ROUNDS) -> float:
    """The seconds of the run that a timeline shows: from its start, about `rounds` rounds of the slowest head."""
    longest = max((head.ended / head.contributions for head in run.heads if head.contributions), default=run.seconds)
    return min(run.seconds, rounds * longest) or 1.0


def timeline(run: SimulationRecord, width: int, *, unicode: bool = True) -> Text:
    """The timeline as text: a line for each row, a ruler, and a legend.

    A column shows what the row did for most of its slice of time.

    Args:
        width: columns in total.
        unicode: whether characters beyond ASCII may be used.
    """
    until = shown_seconds(run)
    names = max(len(row.name) for row in run.rows)
    columns = max(10, width - names - 1)
    text = Text(no_wrap=True, overflow="crop")
    seen = []
    for row in run.rows:
        text.append(f"{row.name:>{names}} ")
        marks = _adoption_slices(row, until, columns)
        for column, kind in enumerate(slices(row, until, columns)):
            if kind == "train" and column in marks:
                seen.append("adopted")
                text.append("│" if unicode else "|", style="bold")
                continue
            if kind is None:
                text.append(IDLE)
                continue
            seen.append(kind)
            symbol, ascii_symbol, style = STYLES[kind]
            text.append(symbol if unicode else ascii_symbol, style=style)
        text.append("\n")
    end = f"{until:,.4g} s" + (f" of {run.seconds:,.4g} s" if until < run.seconds else "")
    text.append(" " * (names + 1) + "0" + end.rjust(columns - 1) + "\n", style="dim")
    text.append(" " * (names + 1))
    for kind, (symbol, ascii_symbol, style) in STYLES.items():
        if kind in seen:
            text.append(symbol if unicode else ascii_symbol, style=style)
            text.append(f" {kind if kind != 'adopted' else 'newer base adopted while training'}   ")
    return text


def slices(row: Row, until: float, count: int) -> list[str | None]:
    """What fills most of each of `count` equal slices of [0, `until`); None if the row was idle for most of it."""
    step = until / count
    kinds: list[str | None] = []
    first = 0
    for index in range(count):
        begin, end = index * step, (index + 1) * step
        while first < len(row.spans) and row.spans[first].end <= begin:
            first += 1
        kinds.append(_dominant_kind(row.spans, first, begin, end))
    return kinds


def _adoption_slices(row: Row, until: float, count: int) -> set[int]:
    """The slices in which a newer base was adopted; none if there are too many to tell apart."""
    marks = {int(at / until * count) for at in row.adopted if at < until}
    return marks if len(marks) <= count // 4 else set()


def _dominant_kind(spans: Sequence[Span], first: int, begin: float, end: float) -> str | None:
    shares: dict[str | None, float] = {}
    for span in spans[first:]:
        if span.start >= end:
            break
        shares[span.kind] = shares.get(span.kind, 0.0) + min(span.end, end) - max(span.start, begin)
    shares[None] = (end - begin) - sum(shares.values())
    return max(shares, key=lambda kind: shares[kind])


def svg(run: SimulationRecord, title: str) -> str:
    """The timeline as a picture: a bar for each span, a tick where a newer base was adopted during training, a ruler, a legend.

    Spans narrower than `MIN_SPAN_WIDTH` are left out.
    """
    until = shown_seconds(run)
    scale = WIDTH / until
    height = TOP + len(run.rows) * (ROW_HEIGHT + GAP) + 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{LEFT + WIDTH + 20}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{LEFT}" y="39" fill="#666666">{escape(_subtitle(run))}</text>',
    ]
    for index, row in enumerate(run.rows):
        y = TOP + index * (ROW_HEIGHT + GAP)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(row.name)}</text>')
        parts += _bars(row, y, until, scale)
    bottom = TOP + len(run.rows) * (ROW_HEIGHT + GAP)
    for tick in range(6):
        x, at = LEFT + WIDTH * tick / 5, until * tick / 5
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#000000" stroke-opacity="0.12"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#666666">{at:.4g} s</text>')
    x = float(LEFT)
    for kind in [kind for kind in COLORS if any(span.kind == kind for row in run.rows for span in row.spans)]:
        parts.append(f'<rect x="{x}" y="{bottom + 28}" width="12" height="12" fill="{COLORS[kind]}"/>')
        parts.append(f'<text x="{x + 17}" y="{bottom + 38}">{kind}</text>')
        x += 90
    if any(row.adopted for row in run.rows):
        parts.append(f'<line x1="{x + 5}" y1="{bottom + 26}" x2="{x + 5}" y2="{bottom + 42}" stroke="#000000"/>')
        parts.append(f'<text x="{x + 17}" y="{bottom + 38}">newer base adopted</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _subtitle(run: SimulationRecord) -> str:
    return (
        f"{len(run.heads)} heads, {run.versions} merges in {run.seconds:,.4g} s, utilisation {100 * run.utilisation:.1f}%, "
        f"mean staleness {run.mean_lag:.2f} versions"
    )


def _bars(row: Row, y: int, until: float, scale: float) -> list[str]:
    parts = []
    for span in row.spans:
        width = (min(span.end, until) - span.start) * scale
        if width >= MIN_SPAN_WIDTH:
            parts.append(
                f'<rect x="{LEFT + span.start * scale:.2f}" y="{y}" width="{width:.2f}" height="{ROW_HEIGHT}" '
                f'fill="{COLORS[span.kind]}"><title>{span.kind} {span.start:.4g} - {span.end:.4g} s</title></rect>'
            )
    for at in row.adopted:
        if at < until:
            x = LEFT + at * scale
            parts.append(f'<line x1="{x:.2f}" y1="{y - 2}" x2="{x:.2f}" y2="{y + ROW_HEIGHT + 2}" stroke="#000000"/>')
    return parts
