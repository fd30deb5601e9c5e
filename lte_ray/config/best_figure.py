"""The figure of an evaluation that says which weights are best, as ``--best-by`` and ``--figure`` name it."""

from __future__ import annotations


def parse_best_by(text: str) -> tuple[str, float]:
    """Returns a figure's name, and the sign that makes lower better: 1, or -1 after a dash ("-accuracy").

    The name is empty if the text names none.
    """
    return text.removeprefix("-"), -1.0 if text.startswith("-") else 1.0
