"""Names and numbers in the sentences of findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_NAMES = 5
"""Names that a sentence lists, at most."""


def join(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def numbers(values: Iterable[float]) -> str:
    """Numbers with a few digits."""
    return ", ".join(f"{value:.5g}" for value in values)


def plural(count: int, word: str) -> str:
    """A number of things: "1 head", "2 heads"."""
    return f"{count} {word}{'s' * (count != 1)}"
