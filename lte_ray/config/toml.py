"""Settings as TOML, read from a file that anybody may have written: bounded in size, depth and numbers."""

from __future__ import annotations

import tomllib
from typing import Any

NONE = "None"
"""TOML has no such value; flags do."""

LARGEST = 1 << 20
"""Bytes of such a file, at most: many times what settings need."""

DEEPEST = 8
"""Tables and arrays inside each other, at most."""


def parse(data: bytes) -> dict[str, Any]:
    """What the file says.

    Raises:
        ValueError: it is no TOML in UTF-8, or has more bytes, depth or digits than settings ever need; says so in words.
    """
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes, which settings never need")
    try:
        content = tomllib.loads(data.decode())
    except RecursionError:
        raise ValueError("its tables or arrays are nested too deep") from None
    _check(content, DEEPEST)
    return content


def _check(value: Any, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError("its tables or arrays are nested too deep")
        for each in value.values() if isinstance(value, dict) else value:
            _check(each, depth - 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("it holds a whole number of more than 64 bits")
