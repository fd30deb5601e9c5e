"""A simulation's timeline as an SVG picture."""

from __future__ import annotations

from xml.sax.saxutils import escape

from lte_ray.cli.timeline import window
from lte_ray.engine.virtual.record import Row, VirtualRun

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


def svg(run: VirtualRun, title: str) -> str:
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


def _figures(run: VirtualRun) -> str:
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
