"""A policy's own arguments: those of its constructor (or of a function, behind the first two), checked by their annotations."""

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
    """One argument of a policy: its name, annotation (`Any` where there is none), default (or `REQUIRED`) and help."""

    name: str
    annotation: Any
    default: Any
    help: str


def policy_flag(name: str) -> str:
    """The flag of a policy's argument: ``max_rise`` -> ``--policy.max-rise``."""
    return "--policy." + name.replace("_", "-")


def arguments_of(policy: Any) -> dict[str, Argument]:
    """The arguments that a policy's class, or a function ``f(pending, roster, *, ...)``, can be given, by name."""
    try:
        parameters = list(inspect.signature(policy).parameters.values())
    except (TypeError, ValueError):  # a class whose constructor has no signature
        return {}
    try:
        made_by: Any = inspect.getattr_static(policy, "__init__") if isinstance(policy, type) else policy
        hints = typing.get_type_hints(made_by)
    except (AttributeError, NameError, TypeError):  # annotations that can't be resolved say nothing
        hints = {}
    told = _docstring_arguments(inspect.getdoc(policy) or "")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not isinstance(policy, type):
        named = named[2:]
    return {p.name: Argument(p.name, hints.get(p.name, Any), p.default, told.get(p.name, "")) for p in named}


def checked(policy: Any, given: Mapping[str, Any], called: str) -> dict[str, Any]:
    """The arguments `given`, if the policy has them and they are of the annotated types.

    Raises:
        ConfigError: an argument is unknown, of a wrong type, or missing.
    """
    known = arguments_of(policy)
    for name, value in given.items():
        if name not in known:
            has = f"It has: {', '.join(policy_flag(n) for n in known)}." if known else "It has none."
            raise ConfigError(f"The policy {called} has no argument {policy_flag(name)}.{suggest(name, known)} {has}")
        if not _fits(value, known[name].annotation):
            wanted = _called(known[name].annotation)
            shown = MASK if is_sensitive(name, value) else repr(value)
            raise ConfigError(f"{policy_flag(name)} is {shown}, but the policy {called} takes {wanted} there.")
    missing = [policy_flag(n) for n, a in known.items() if a.default is REQUIRED and n not in given]
    if missing:
        raise ConfigError(f"The policy {called} needs {', '.join(missing)}.")
    return {name: _as_annotated(value, known[name].annotation) for name, value in given.items()}


def within(name: str, value: float, low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> None:
    """Raises ConfigError unless low <= value <= high and finite; `above` and `below` exclude the bound itself."""
    if not (low < value if above else low <= value) or not (value < high if below or high == math.inf else value <= high):
        lower = f"{'above' if above else 'at least'} {low:g}"
        upper = "finite" if high == math.inf else f"{'below' if below else 'at most'} {high:g}"
        raise ConfigError(f"{policy_flag(name)} is {value}, but it must be {lower} and {upper}.")


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless `value` is one of the `known` words."""
    known = list(known)
    if value not in known:
        raise ConfigError(
            f"{policy_flag(name)} is {value!r}, but it must be one of: {', '.join(known)}.{suggest(str(value), known)}"
        )


def _fits(value: Any, wanted: Any) -> bool:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin in (list, tuple):
        item = inner[0] if inner else Any
        return isinstance(value, list | tuple) and all(_fits(v, item) for v in value)
    if wanted is type(None):
        return value is None
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted in (bool, str):
        return isinstance(value, wanted)
    return True  # an annotation of another kind is the policy's own affair


def _as_annotated(value: Any, wanted: Any) -> Any:
    if wanted is float:
        return float(value)
    return tuple(value) if typing.get_origin(wanted) is tuple and isinstance(value, list) else value


def _called(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(wanted)))}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return words.get(wanted) or str(wanted).replace("typing.", "")


def _docstring_arguments(text: str) -> dict[str, str]:
    """The entries of a docstring's ``Args:`` section."""
    told: dict[str, str] = {}
    inside, name = False, ""
    for line in text.splitlines():
        if not line.startswith(" "):
            inside = line.strip() == "Args:" if line.strip() else inside
        elif inside and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, rest = (part.strip() for part in line.partition(":"))
            told[name] = rest
        elif inside and name:
            told[name] += " " + line.strip()
    return told
