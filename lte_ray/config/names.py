"""Names of runs: one folder each, on every filesystem, that no trick of spelling leads out of the storage root."""

from __future__ import annotations

import unicodedata
from typing import Any

from lte_ray.errors import ConfigError

LONGEST = 255
"""Bytes of a folder's name on the usual filesystems (NAME_MAX)."""

SEPARATORS = "/\\"


def check_run_name(name: Any, what: str = "--name") -> None:
    """Raises ConfigError unless `name` is None or one plain folder name that can't leave the storage root.

    Args:
        what: the setting that gave it, for the message.
    """
    wrong = None if name is None else _wrong(name)
    if wrong:
        shown = f"{name[:40]!r}..." if isinstance(name, str) and len(name) > 80 else repr(name)
        raise ConfigError(f"{what} is {shown}, but it must be one plain folder name, such as 'gpt-8': {wrong}.")


def _wrong(name: Any) -> str:
    """What is wrong with it, or ''."""
    if not isinstance(name, str):
        return f"a name is text, not {type(name).__name__}"
    if not name:
        return "a name can't be empty"
    for character in name:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            # Among them NUL, line ends, lone surrogates and marks that turn the writing's direction.
            return f"it holds the invisible character U+{ord(character):04X}"
        if character.isspace() and character != " ":
            return f"it holds the space U+{ord(character):04X}"
    # Some filesystems and tools fold such letters: a fullwidth solidus becomes a slash, a two dot leader two dots.
    folded = unicodedata.normalize("NFKC", name)
    if any(c in folded for c in SEPARATORS):
        return "it holds a slash, which leads into another folder"
    if folded.startswith("."):
        return "it begins with a dot, as hidden folders and the parent folder do"
    if name.startswith("-"):
        return "it begins with a dash, as flags do"
    if name != name.strip() or folded != folded.strip() or folded.endswith("."):
        return "it begins or ends with a space, or ends with a dot, which some filesystems drop"
    if (size := len(name.encode())) > LONGEST:
        return f"it has {size} bytes, and a folder's name at most {LONGEST}"
    return ""
