"""Settings as TOML: parsed with bounds, since the file may come from anywhere, and converted to the types of settings."""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import inspect
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from lte_ray.config.units import with_units
from lte_ray.config.validation import suggest
from lte_ray.errors import ConfigError
from lte_ray.redaction import MASK, is_sensitive, same_plain_value

NONE = "None"
"""How files write None, which TOML lacks; flags write it so, too."""

DATA = "training_data"
"""The name under which ``run.toml`` describes the data. No setting: only a resumed run reads it."""

MAX_BYTES = 1 << 20
"""Size of a settings file, at most: many times what settings need."""

MAX_DEPTH = 8
"""Tables and arrays inside each other, at most."""


def parse(data: bytes) -> dict[str, Any]:
    """Parses a settings file.

    Raises:
        ValueError: it isn't TOML in UTF-8, or has more bytes, depth or digits than settings ever need; the text says which.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes, which settings never need")
    try:
        content = tomllib.loads(data.decode())
    except RecursionError:
        raise ValueError("its tables or arrays are nested too deep") from None
    _check_bounds(content, MAX_DEPTH)
    return content


def _check_bounds(value: Any, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError("its tables or arrays are nested too deep")
        for each in value.values() if isinstance(value, dict) else value:
            _check_bounds(each, depth - 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("it holds a whole number of more than 64 bits")


def read_fields(kind: type, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the values that `content` has for the fields of a settings class, converted to the fields' types.

    Args:
        where: the file, for messages.

    Raises:
        ConfigError: a value has the wrong type.
    """
    hints = typing.get_type_hints(kind)
    return {
        field.name: read_value(where, field.name, content[field.name], with_units(field, hints[field.name]), field.default)
        for field in dataclasses.fields(kind)
        if field.name in content
    }


def read_value(where: str, name: str, value: Any, annotation: Any, default: Any = inspect.Parameter.empty) -> Any:
    """Converts one value of a settings file as `convert`. A value equal to its default gives the default, whatever its type.

    Raises:
        ConfigError: it has the wrong type; the message names the file and the setting, and shows no secret.
    """
    if (value == NONE and default is None) or same_plain_value(value, default):
        return default
    try:
        return convert(value, annotation)
    except ValueError as error:
        shown = MASK if is_sensitive(name, value) else _show(value)
        raise ConfigError(f"{where}: {name} is {shown}, but it must be {error}.") from None


def _show(value: Any) -> str:
    text = "a table" if isinstance(value, dict) else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def convert(value: Any, annotation: Any) -> Any:
    """Converts a TOML value to an annotated type.

    TOML lacks None (written "None"), tuples and sets (written as arrays), paths, and members of an Enum (written by name).
    As with flags, text that reads as a number is one where a number is expected, and a single value stands for a list of one.

    Raises:
        ValueError: it has another type. The text says what it must be, as "a whole number".
    """
    options = _options(annotation)
    if value == NONE and type(None) in options:
        return None
    for option in options:
        if _matches(value, option):
            return value
    for option in options:
        try:
            return _convert(value, option)
        except (ValueError, ArithmeticError, RuntimeError):  # as the constructors of `_BY_TEXT` raise
            continue
    raise ValueError(" or ".join(dict.fromkeys(_describe(option, value) for option in options)))


_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)

_TABLES = (dict, collections.abc.Mapping)

_BY_TEXT = ("torch.device", "uuid.UUID", "decimal.Decimal", "ipaddress.IPv4Address", "ipaddress.IPv6Address")
"""Classes whose constructors parse their text. By name, since nothing here imports torch."""


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, else the annotation alone."""
    if typing.get_origin(annotation) is Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(option for inner in typing.get_args(annotation) for option in _options(inner))
    return (type(None) if annotation is None else annotation,)


def _matches(value: Any, option: Any) -> bool:
    """Whether TOML has this type itself, so that the value stays as it is."""
    if option in (Any, object, inspect.Parameter.empty):
        return True
    if option is str:
        return isinstance(value, str) and value != NONE
    if typing.get_origin(option) is Literal:
        return any(type(value) is type(each) and value == each for each in typing.get_args(option))
    if typing.get_origin(option) in _TABLES:
        return isinstance(value, dict)
    return option in (bool, int, float, datetime.datetime, datetime.date, datetime.time) and type(value) is option


def _convert(value: Any, option: Any) -> Any:
    origin, inner = typing.get_origin(option), typing.get_args(option)
    if (origin or option) in _SEQUENCES:
        return _convert_sequence(value, origin or option, inner)
    if origin is Literal:
        for each in inner:
            if str(value) == (each.name if isinstance(each, Enum) else str(each)):
                return each
    elif isinstance(value, dict | list) or not isinstance(option, type):
        pass
    elif option is str:
        return str(value)
    elif option in (int, float):
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return option(value)
    elif issubclass(option, Enum):
        if isinstance(value, str) and value in option.__members__:
            return option[value]
    elif issubclass(option, Path | datetime.date | datetime.time):
        read = Path if issubclass(option, Path) else option.fromisoformat
        return read(str(value))
    elif f"{option.__module__}.{option.__qualname__}" in _BY_TEXT:
        return typing.cast("Callable[[str], Any]", option)(str(value))
    raise ValueError


def _convert_sequence(value: Any, kind: Any, inner: tuple[Any, ...]) -> Any:
    if isinstance(value, dict) or value == NONE:
        raise ValueError
    values = value if isinstance(value, list) else [value]
    annotations = list(inner) or [Any]
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        if len(values) != len(inner):
            raise ValueError
    else:
        annotations = annotations[:1] * len(values)
    items = [convert(each, annotation) for each, annotation in zip(values, annotations, strict=True)]
    return kind(items) if kind in (list, tuple, set, frozenset) else items


def _describe(option: Any, value: Any) -> str:
    """What a value must be, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): f"{NONE!r}"}
    origin, inner = typing.get_origin(option), typing.get_args(option)
    if option in words:
        return words[option]
    if origin in _TABLES:
        return "a table"
    if (origin or option) in _SEQUENCES:
        if origin is tuple and inner[-1] is not Ellipsis:
            return f"a list of {len(inner)} values ({', '.join(_describe_all(each) for each in inner)})"
        return f"a list, each item {_describe_all(inner[0])}" if inner else "a list"
    if origin is Literal or (isinstance(option, type) and issubclass(option, Enum)):
        names = [each.name if isinstance(each, Enum) else str(each) for each in (inner or option)]
        hint = suggest(str(value), names)
        return f"one of: {', '.join(names)}" + (f" ({hint.strip()})" if hint else "")
    if isinstance(option, type) and issubclass(option, Path | datetime.date | datetime.time):
        return "a path" if issubclass(option, Path) else f"a {option.__name__}"
    return f"left out, since a file can't give a {getattr(option, '__name__', option)}"


def _describe_all(annotation: Any) -> str:
    return " or ".join(_describe(option, "") for option in _options(annotation))
