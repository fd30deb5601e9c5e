"""The TOML file of ``--config``: read with bounds, and turned into flags, so that it is checked just like flags."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lte_ray.cli.policy_flags import TABLE, check_names, policy_arguments
from lte_ray.config import SECTIONS, flag, near, toml
from lte_ray.errors import ConfigError
from lte_ray.redaction import OMITTED, same

EACH_HEADS = ("lora_r", "lora_alpha")
"""Settings that are one number, or one for each head."""


def read(path: Path) -> dict[str, Any]:
    """What the file says; of a ``run.toml``, its settings for another run, under another name.

    Raises:
        ConfigError: it is missing, or no TOML that settings can be in.
    """
    try:
        with path.open("rb") as file:
            data = file.read(toml.LARGEST + 1)  # no more, whatever it is
    except OSError as error:
        raise ConfigError(f"--config {path} can't be read: {error.strerror}.") from error
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"--config {str(path)!r} can't be read: {error}.") from error
    try:
        content = toml.parse(data)
    except ValueError as error:
        raise ConfigError(f"--config {path} isn't valid TOML: {error}.") from error
    if not isinstance(content.get("policy", ""), str):
        raise ConfigError(f"--config {path}: policy must be text, the name of a merge policy or module:Class.")
    if content.pop("program", None) is not None:  # a run.toml
        content.pop("name", None)
    else:
        _refuse_omitted(path, content)
    return content


def as_arguments(
    path: Path, content: dict[str, Any], worker: type | None, policy: str, kinds: Iterable[type], rest: list[str]
) -> list[str]:
    """The file's settings as flags, those of `kinds`, the worker and the policy; `rest` are the flags given beside it.

    Raises:
        ConfigError: a name is unknown, a value is none that a flag can say, or a secret that the file leaves out isn't given.
    """
    where = f"--config {path}"
    omitted = content.pop(OMITTED, [])
    of_policy = check_names(content.pop(TABLE, {}), policy, where)
    own = content.pop("worker", {})
    if not isinstance(own, dict):
        raise ConfigError(f"{where}: worker must be a table [worker] of the worker's own settings.")
    known = {f.name: f.default for kind in kinds for f in dataclasses.fields(kind) if f.name != TABLE}
    elsewhere = {f.name for kind in SECTIONS for f in dataclasses.fields(kind)} - set(known)
    content = {name: value for name, value in content.items() if name not in elsewhere}
    theirs_of_policy = {name: a.default for name, a in policy_arguments(policy).items()}
    theirs = {name: p.default for name, p in inspect.signature(worker).parameters.items()} if worker else {}
    _check_given(where, omitted, rest, {"worker": theirs, "policy": theirs_of_policy})
    arguments: list[str] = []
    tables = (("", content, known), ("policy.", of_policy, theirs_of_policy), ("worker.", own, theirs))
    for prefix, values, names in tables:
        for name, value in values.items():
            if name not in names:
                hint = near(name, names) or f" Known are: {', '.join(sorted(names)) or 'none'}."
                raise ConfigError(f"{where} has an unknown setting {prefix}{name}.{hint}")
            arguments += _flags(where, prefix, name, value, names[name])
    return arguments


def _flags(where: str, prefix: str, name: str, value: Any, default: Any) -> list[str]:
    """One setting as flags. Text can't pass for another flag: it is joined to its own, or refused in a list."""
    called = "--" + prefix + flag(name)[2:]
    if isinstance(value, bool) and isinstance(default, bool):
        return [] if value == default else [called if value else f"--{prefix}no-{flag(name)[2:]}"]
    if value == toml.NONE if default is None else same(value, default):  # also of those that no flag can say
        return []
    each = value if isinstance(value, list) else [value]
    for one in each:
        if isinstance(one, dict | list):
            shape = "a table" if isinstance(one, dict) else "a list of lists"
            raise ConfigError(f"{where}: {prefix}{name} is {shape}, which no setting is. Give a plain value or a list of them.")
    if isinstance(value, list):
        if isinstance(default, str | int | float) and not (not prefix and name in EACH_HEADS):
            raise ConfigError(f"{where}: {prefix}{name} is a list, but it must be one value, as {default!r}.")
        flags = [text for text in map(str, value) if text.startswith("-") and not _is_number(text)]
        if flags:
            raise ConfigError(
                f"{where}: {prefix}{name} holds {flags[0]!r}, which would be read as a flag. Write it without '-'."
            )
        return [called, *map(str, value)] if value or default else []
    return [f"{called}={value}"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_omitted(path: Path, content: Mapping[str, Any]) -> None:
    if OMITTED in content:
        raise ConfigError(f"--config {path} has {OMITTED!r}, which only a run.toml has. Remove that line.")


def _check_given(where: str, omitted: Any, rest: list[str], known: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ConfigError unless every secret that the file leaves out, and that this run takes, is given as a flag."""
    if not isinstance(omitted, list) or not all(isinstance(name, str) for name in omitted):
        raise ConfigError(f"{where}: {OMITTED} must be a list of names.")
    given = {argument.partition("=")[0].replace("_", "-") for argument in rest}
    missing = []
    for name in omitted:
        table, _, own = name.partition(".")
        asked = f"--{table}.{own.replace('_', '-')}"
        if own in known.get(table, {}) and not any(g == asked or g.startswith(asked + ".") for g in given):
            missing.append(asked)
    if missing:
        raise ConfigError(
            f"{where} leaves out {', '.join(missing)}, since run.toml holds no secrets. Give it again: {missing[0]} VALUE."
            if len(missing) == 1
            else f"{where} leaves out {', '.join(missing)}, since run.toml holds no secrets. Give them again as flags."
        )
