"""Numbers with units, as people write them: times such as ``30s`` or ``1h30m``, and rates such as ``10Gbit`` or ``1.25GB``,
and amounts of memory such as ``80GB``.

A plain number counts in the base unit, seconds or bytes per second.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from lte_ray.errors import ConfigError

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"

_TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_PREFIXES = {
    "": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip

_SIZE = re.compile(rf"({_NUMBER})\s*([kKMGT]i?|)(bit|bps|B)((?:/s)?)")


def seconds(value: str | float, name: str = "the time") -> float:
    """Reads a time: ``250ms``, ``30s``, ``5m``, ``2h``, ``1d``, several of them as ``1h30m``, or a number of seconds.

    Args:
        name: the setting for the message, e.g. ``--deadline``.

    Raises:
        ConfigError: it has another form.
    """
    plain = _plain(value)
    if plain is not None:
        return plain
    text = str(value).strip()
    parts = re.findall(rf"({_NUMBER})\s*(ms|[smhd])\s*", text)
    if not re.fullmatch(rf"(?:{_NUMBER}\s*(?:ms|[smhd])\s*)+", text):
        raise ConfigError(f"{name} is {value!r}, but it must be a time such as 30s, 5m, 1h30m, or a number of seconds.")
    return sum(float(number) * _TIME_UNITS[unit] for number, unit in parts)


def bytes_per_second(value: str | float, name: str = "the rate") -> float:
    """Reads a rate: ``10Gbit``, ``10Gbps``, ``1.25GB``, ``100MiB/s``, or a number of bytes per second.

    Args:
        name: the setting for the message, e.g. ``--bandwidth``.

    Raises:
        ConfigError: it has another form. ``10Gb`` is refused, since people mean bits and bytes by it.
    """
    plain = _plain(value)
    if plain is not None:
        return plain
    match = _SIZE.fullmatch(str(value).strip())
    if not match or (match[3] == "bps" and match[4]):
        raise ConfigError(
            f"{name} is {value!r}, but it must be a rate such as 10Gbit or 1.25GB, or a number of bytes per second."
        )
    return float(match[1]) * _PREFIXES[match[2]] / (1 if match[3] == "B" else 8)


def size_in_bytes(text: str) -> float | None:
    """Reads an amount of memory: ``80GB``, ``24GiB``, or a number of bytes; None if it has another form."""
    plain = _plain(text)
    match = _SIZE.fullmatch(text.strip())
    if plain is None and match and match[3] == "B" and not match[4]:
        return float(match[1]) * _PREFIXES[match[2]]
    return plain


def _plain(value: str | float) -> float | None:
    """A value without unit; None if it isn't a number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return None


def has_unit(value: str | float) -> bool:
    """Whether a value is text that isn't a plain number."""
    return _plain(value) is None


READERS: Mapping[str, Callable[[str | float, str], float]] = {"time": seconds, "rate": bytes_per_second}
"""The function that reads a setting by its unit (`lte_ray.config.validation.setting`)."""


def read_units(config: object) -> None:
    """Replaces text in the settings that have a unit by numbers in the base unit; a settings class calls it first.

    Raises:
        ConfigError: a text has another form.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        unit, value = field.metadata.get("unit"), getattr(config, field.name)
        if unit and isinstance(value, str):
            object.__setattr__(config, field.name, READERS[unit](value, "--" + field.name.replace("_", "-")))


def with_units(field: dataclasses.Field[Any], annotation: Any) -> Any:
    """The type of a setting's flag or TOML value: text is accepted, too, if the setting has a unit."""
    return annotation | str if "unit" in field.metadata else annotation
