"""The flags of the chosen merge policy's own arguments: ``--policy.NAME VALUE``."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from lte_ray.config import suggest
from lte_ray.errors import ConfigError

if TYPE_CHECKING:
    from lte_ray.merging.policy_args import Argument

REQUIRED = inspect.Parameter.empty
TABLE = "policy_args"
"""The name of the table of these arguments in TOML files, and of the settings' field. It isn't a flag itself."""


UNTYPED = int | float | bool | str
"""The type of the flag of an argument without annotation and default: what reads as a number, True or False is one."""


def chosen_policy(arguments: list[str], in_file: str) -> str:
    """The merge policy of the run: that of the last ``--policy``, else the one in the TOML file."""
    chosen = in_file
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == "--policy":
            chosen = following
        elif argument.startswith("--policy="):
            chosen = argument.removeprefix("--policy=")
    return chosen


def policy_arguments(policy: str) -> dict[str, Argument]:
    """The chosen policy's arguments by name. A policy object has none, since it is made already.

    Raises:
        ConfigError: there is no such policy.
    """
    if policy == "auto":  # its choices have arguments only once they are made
        return {}
    from lte_ray.merging.policy_args import list_arguments  # imports torch; help and error messages come faster without it
    from lte_ray.merging.registry import find_policy

    value = find_policy(policy)
    return list_arguments(value) if isinstance(value, type) or hasattr(value, "__code__") else {}


def policy_section(policy: str, defaults: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The section of flags, as (field name, annotation) for a dataclass of sections; None if the policy has no arguments.

    Args:
        defaults: values that replace the defaults of arguments.

    Raises:
        ConfigError: there is no such policy, or it needs an argument that can't be a flag.
    """
    known = [a for a in policy_arguments(policy).values() if _is_flag(a, policy)]
    if not known:
        return None
    import tyro

    known = [dataclasses.replace(a, default=defaults.get(a.name, a.default)) for a in known]
    fields = [(a.name, Annotated[flag_type(a), tyro.conf.arg(help=a.help)], dataclasses.field(**_default(a))) for a in known]
    section = dataclasses.make_dataclass("PolicyFlags", fields, kw_only=True)
    section.__doc__ = f"Arguments of the merge policy {policy}."
    return TABLE, Annotated[section, tyro.conf.arg(name="policy")]


def parsed_arguments(flags: Any) -> dict[str, Any] | None:
    """The policy's arguments as parsed, or None if it has none."""
    section = getattr(flags, TABLE, None)
    if section is None:
        return None
    return {f.name: _read_boolean(getattr(section, f.name), f.type) for f in dataclasses.fields(section)}


def _read_boolean(value: Any, annotation: Any) -> Any:
    """The value of an untyped argument; true and false, as TOML writes them, as booleans, too."""
    untyped = typing.get_args(annotation)[0] in (UNTYPED, UNTYPED | None)
    return {"true": True, "false": False}.get(value, value) if untyped and isinstance(value, str) else value


def check_names(table: Any, policy: str, place: str) -> dict[str, Any]:
    """Checks that the names in the file's table are those of the policy's arguments, and returns it.

    Raises:
        ConfigError: it isn't a table, or has an unknown name.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{place}: {TABLE} must be a table [{TABLE}] of the merge policy's own arguments.")
    known = policy_arguments(policy)
    for name in table:
        if name not in known:
            names = f"It has: {', '.join(known)}." if known else "It has none."
            hint = suggest(name, known)
            flag = f"--policy.{name.replace('_', '-')}"
            raise ConfigError(f"{place}: the policy {policy} has no argument {name} ({flag}).{hint} {names}")
    return table


def _is_flag(argument: Argument, policy: str) -> bool:
    """Whether an argument can be a flag. One that can't, but has a default, can be given in Python only."""
    if _is_plain(flag_type(argument)):
        return True
    if argument.default is REQUIRED:
        raise ConfigError(
            f"The policy {policy} needs {argument.name}, which can't be a flag: annotate it as int, float, str, bool, a "
            "Literal or a tuple of them, or give it a default."
        )
    return False


def _is_plain(annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType, tuple, list):
        return all(_is_plain(each) for each in inner if each is not Ellipsis)
    return origin is typing.Literal or annotation in (int, float, str, bool, type(None))


def flag_type(argument: Argument) -> Any:
    """The type of an argument's flag: its annotation, or the default's type if it has none.

    What has neither is a number or True or False if it reads as one, else text.
    """
    if argument.annotation is not Any:
        return argument.annotation
    if argument.default is None:
        return UNTYPED | None
    if argument.default is REQUIRED:
        return UNTYPED
    kind = type(argument.default)
    return int | float if kind is int else kind  # 1 may be meant as a number


def _default(argument: Argument) -> dict[str, Any]:
    if argument.default is REQUIRED:
        return {}
    value = argument.default
    if isinstance(value, list | dict | set):  # a dataclass allows no mutable default
        return {"default_factory": lambda: value}
    return {"default": value}
