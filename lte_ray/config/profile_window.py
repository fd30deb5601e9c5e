"""The range of local steps that ``--profile`` records."""

from __future__ import annotations

import re

from lte_ray.errors import ConfigError


def parse_window(text: str) -> tuple[int, int] | None:
    """Returns the first and the last local step of ``20:30``, both included; None for an empty text.

    Raises:
        ConfigError: it has another form, or the last is before the first.
    """
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d{1,12}):(\d{1,12})\s*", text) if isinstance(text, str) else None
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile is {text!r}, but it must be the first and the last local step to record, counted from 1, such as 20:30."
        )
    return first, last
