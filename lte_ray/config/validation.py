"""What all settings classes share: a field with its help, and checks whose errors name the flag.

Names of runs: one folder each, on every filesystem, that no trick of spelling leads out of the storage root.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import unicodedata
from collections.abc import Iterable
from numbers import Real
from typing import Any

from lte_ray.errors import ConfigError


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and the help text that users see."""
    return dataclasses.field(default=default, metadata={"help": help})


def flag(name: str) -> str:
    """The command-line flag of a field: ``merge_iter`` -> ``--merge-iter``."""
    return "--" + name.replace("_", "-")


def at_least(config: object, low: float, *names: str) -> None:
    """Raises ConfigError unless each named number is finite and not below `low`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ConfigError(f"{flag(name)} is {value!r}, but it must be a number.")
        if not math.isfinite(value):
            raise ConfigError(f"{flag(name)} is {value}, but it must be a finite number.")
        if value < low:
            raise ConfigError(f"{flag(name)} is {value}, but it must be at least {low}.")


def integers(config: object, *names: str) -> None:
    """Raises ConfigError unless each named value is a whole number."""
    for name in names:
        if not is_integer(getattr(config, name)):
            raise ConfigError(f"{flag(name)} is {getattr(config, name)!r}, but it must be a whole number.")


def switches(config: object, *names: str) -> None:
    """Raises ConfigError unless each named value is True or False."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{flag(name)} is {getattr(config, name)!r}, but it must be True or False.")


def names_of(config: object, *names: str) -> None:
    """Makes each named value, a collection of names, a tuple. Raises ConfigError if it is something else."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{flag(name)} is {value!r}, but it must be a list of names.")
        object.__setattr__(config, name, tuple(value))


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number, which True and False aren't."""
    return isinstance(value, int) and not isinstance(value, bool)


def words(config: object, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless the value, or each of a tuple's, is one of the `known` words."""
    value, known = getattr(config, name), list(known)
    for word in value if isinstance(value, tuple) else (value,):
        if word not in known:
            raise ConfigError(
                f"{flag(name)} is {word!r}, but it must be one of: {', '.join(known)}.{suggest(str(word), known)}"
            )


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean x?' for the known name nearest to `name`, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


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
