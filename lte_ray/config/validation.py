"""What the settings classes share: fields with a help text, checks whose errors name the flag, and the rules for run names.

A run's name is one folder. No spelling of it may lead out of the storage, on any filesystem.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import unicodedata
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal

from lte_ray.errors import ConfigError

MAX_NAME_BYTES = 255
"""Bytes of a folder's name on common filesystems (NAME_MAX)."""

SEPARATORS = "/\\"


def setting(default: Any, help: str, unit: Literal["time", "rate", ""] = "") -> Any:
    """A dataclass field with its default and the help text that users see.

    Args:
        unit: "time" for seconds and "rate" for bytes per second, which may be given as text with a unit
            (`lte_ray.config.units.read_units` makes numbers of it).
    """
    return dataclasses.field(default=default, metadata={"help": help} | ({"unit": unit} if unit else {}))


def flag(name: str) -> str:
    """The command-line flag of a field: ``merge_iter`` -> ``--merge-iter``, ``from_`` -> ``--from``."""
    return "--" + name.rstrip("_").replace("_", "-")


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean x?' for the known name that is most similar to `name`, or '' if none is."""
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {similar[0]}?" if similar else ""


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number, which True and False aren't."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_at_least(config: object, low: float, *names: str) -> None:
    """Raises ConfigError unless each named number is finite and not below `low`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ConfigError(f"{flag(name)} is {value!r}, but it must be a number.")
        if not math.isfinite(value):
            raise ConfigError(f"{flag(name)} is {value}, but it must be a finite number.")
        if value < low:
            raise ConfigError(f"{flag(name)} is {value}, but it must be at least {low}.")


def check_integers(config: object, *names: str) -> None:
    """Raises ConfigError unless each named value is a whole number."""
    for name in names:
        if not is_integer(getattr(config, name)):
            raise ConfigError(f"{flag(name)} is {getattr(config, name)!r}, but it must be a whole number.")


def check_booleans(config: object, *names: str) -> None:
    """Raises ConfigError unless each named value is True or False."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{flag(name)} is {getattr(config, name)!r}, but it must be True or False.")


def check_choice(config: object, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless the value, or each item of a tuple, is one of the `known` words."""
    value, known = getattr(config, name), list(known)
    for word in value if isinstance(value, tuple) else (value,):
        if word not in known:
            hint = suggest(str(word), known)
            raise ConfigError(f"{flag(name)} is {word!r}, but it must be one of: {', '.join(known)}.{hint}")


def to_name_tuples(config: object, *names: str) -> None:
    """Turns each named value, a collection of names, into a tuple. Raises ConfigError for other values."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{flag(name)} is {value!r}, but it must be a list of names.")
        object.__setattr__(config, name, tuple(value))


def check_run_name(name: Any, what: str = "--name") -> None:
    """Raises ConfigError unless `name` is None or one plain folder name that can't lead out of the storage.

    Args:
        what: the setting that gave it, for the message.
    """
    problem = None if name is None else _name_problem(name)
    if problem:
        shown = f"{name[:40]!r}..." if isinstance(name, str) and len(name) > 80 else repr(name)
        raise ConfigError(f"{what} is {shown}, but it must be one plain folder name, such as 'gpt-8': {problem}.")


def _name_problem(name: Any) -> str:
    """What is wrong with a name, or ''."""
    if not isinstance(name, str):
        return f"a name is text, not {type(name).__name__}"
    if not name:
        return "a name can't be empty"
    for character in name:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            # Among them NUL, line ends, lone surrogates, and marks that change the direction of writing.
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
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        return f"it has {size} bytes, and a folder's name at most {MAX_NAME_BYTES}"
    return ""
