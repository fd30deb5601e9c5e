"""A policy's own arguments: those of its constructor, or of a function after the first two, checked by their annotations."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lte_ray.config import suggest
from lte_ray.errors import ConfigError
from lte_ray.redaction import MASK, is_sensitive

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """One argument of a policy: its name, annotation (`Any` if there is none), default (or `REQUIRED`) and help text."""

    name: str
    annotation: Any
    default: Any
    help: str


def policy_flag(name: str) -> str:
    """Returns the flag of a policy's argument: ``--policy.max-rise`` for ``max_rise``."""
    return "--policy." + name.replace("_", "-")


def list_arguments(policy: Any) -> dict[str, Argument]:
    """Returns the arguments that a policy's class, or a function ``f(pending, roster, *, ...)``, accepts, by name."""
    try:
        parameters = list(inspect.signature(policy).parameters.values())
    except (TypeError, ValueError):  # a class whose constructor has no signature
        return {}
    try:
        annotated: Any = inspect.getattr_static(policy, "__init__") if isinstance(policy, type) else policy
        hints = typing.get_type_hints(annotated)
    except (AttributeError, NameError, TypeError):  # annotations that can't be resolved aren't checked
        hints = {}
    descriptions = _docstring_arguments(inspect.getdoc(policy) or "")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not isinstance(policy, type):
        named = named[2:]
    return {p.name: Argument(p.name, hints.get(p.name, Any), p.default, descriptions.get(p.name, "")) for p in named}


def check_arguments(policy: Any, arguments: Mapping[str, Any], display_name: str) -> dict[str, Any]:
    """Returns the arguments, converted to the annotated types where an equal value of another type is accepted.

    Raises:
        ConfigError: an argument is unknown, has the wrong type, or is missing.
    """
    known = list_arguments(policy)
    for name, value in arguments.items():
        if name not in known:
            has = f"It has: {', '.join(policy_flag(n) for n in known)}." if known else "It has none."
            raise ConfigError(f"The policy {display_name} has no argument {policy_flag(name)}.{suggest(name, known)} {has}")
        if not _fits(value, known[name].annotation):
            expected = _describe_annotation(known[name].annotation)
            shown = MASK if is_sensitive(name, value) else repr(value)
            raise ConfigError(f"{policy_flag(name)} is {shown}, but the policy {display_name} takes {expected} there.")
    missing = [policy_flag(n) for n, a in known.items() if a.default is REQUIRED and n not in arguments]
    if missing:
        raise ConfigError(f"The policy {display_name} needs {', '.join(missing)}.")
    return {name: _convert(value, known[name].annotation) for name, value in arguments.items()}


def check_range(
    name: str, value: float, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> None:
    """Raises ConfigError unless the value is finite and low <= value <= high; `above` and `below` exclude the bound itself."""
    if not (low < value if above else low <= value) or not (value < high if below or high == math.inf else value <= high):
        lower = f"{'above' if above else 'at least'} {low:g}"
        upper = "finite" if high == math.inf else f"{'below' if below else 'at most'} {high:g}"
        raise ConfigError(f"{policy_flag(name)} is {value}, but it must be {lower} and {upper}.")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless `value` is one of the choices `known`."""
    known = list(known)
    if value not in known:
        raise ConfigError(
            f"{policy_flag(name)} is {value!r}, but it must be one of: {', '.join(known)}.{suggest(str(value), known)}"
        )


def _fits(value: Any, annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin in (list, tuple):
        item = inner[0] if inner else Any
        return isinstance(value, list | tuple) and all(_fits(v, item) for v in value)
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    return True  # the policy itself must check other annotations


def _convert(value: Any, annotation: Any) -> Any:
    if annotation is float:
        return float(value)
    return tuple(value) if typing.get_origin(annotation) is tuple and isinstance(value, list) else value


def _describe_annotation(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(annotation)))}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return words.get(annotation) or str(annotation).replace("typing.", "")


def _docstring_arguments(text: str) -> dict[str, str]:
    """Returns the entries of a docstring's ``Args:`` section."""
    descriptions: dict[str, str] = {}
    inside, name = False, ""
    for line in text.splitlines():
        if not line.startswith(" "):
            inside = line.strip() == "Args:" if line.strip() else inside
        elif inside and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, rest = (part.strip() for part in line.partition(":"))
            descriptions[name] = rest
        elif inside and name:
            descriptions[name] += " " + line.strip()
    return descriptions
