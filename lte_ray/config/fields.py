"""What all settings classes share: a field with its help, and checks whose errors name the flag."""

from __future__ import annotations

import dataclasses
import difflib
import math
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
            raise ConfigError(f"{flag(name)} is {word!r}, but it must be one of: {', '.join(known)}.{near(str(word), known)}")


def near(name: str, known: Iterable[str]) -> str:
    """' Did you mean x?' for the known name nearest to `name`, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
