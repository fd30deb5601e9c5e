"""A simulation's timeline as text: a row for each head, a column for each slice of time."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from lte_ray.engine.virtual.record import Row, Span, VirtualRun

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


def window(run: VirtualRun, rounds: int = ROUNDS) -> float:
    """The seconds of the run that a picture shows: from its start, about so many rounds of the slowest head."""
    longest = max((head.ended / head.contributions for head in run.heads if head.contributions), default=run.seconds)
    return min(run.seconds, rounds * longest) or 1.0


def timeline(run: VirtualRun, width: int, *, unicode: bool = True) -> Text:
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
