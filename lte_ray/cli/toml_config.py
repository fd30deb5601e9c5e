"""Settings from a TOML file (``--config``, or the ``run.toml`` of a resumed run), which become the defaults of the flags."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lte_ray.cli.policy_flags import TABLE, check_names, flag_type, policy_arguments
from lte_ray.config import SECTIONS, suggest, toml
from lte_ray.config.run import LENGTHS
from lte_ray.config.units import with_units
from lte_ray.config.validation import flag
from lte_ray.errors import ConfigError
from lte_ray.redaction import OMITTED


@dataclass(frozen=True)
class FileSettings:
    """A parsed settings file: `content` as TOML has it, and the file's name for messages."""

    where: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Defaults:
    """Values that replace the defaults of flags: of the settings classes, the merge policy's arguments, and the worker's."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    worker: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> FileSettings:
    """Reads the file of ``--config``. A ``run.toml`` gives its settings to another run, under another name.

    Raises:
        ConfigError: the file is missing, isn't TOML, or has a key that only ``run.toml`` has.
    """
    where = f"--config {path}"
    try:
        with path.open("rb") as file:
            data = file.read(toml.MAX_BYTES + 1)  # bounded: it may be a device
    except OSError as error:
        raise ConfigError(f"{where} can't be read: {error.strerror}.") from error
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"--config {str(path)!r} can't be read: {error}.") from error
    try:
        content = toml.parse(data)
    except ValueError as error:
        if path.suffix.lower() in (".yaml", ".yml", ".json"):
            kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
            raise ConfigError(
                f"{where} is {kind}, but settings files are TOML: num_heads = 4, one setting a line. lte-ray train WORKER "
                "--print-config prints one to start from."
            ) from None
        raise ConfigError(f"{where} isn't valid TOML: {error}.") from error
    if "program" not in content and OMITTED in content:
        raise ConfigError(f"{where} has {OMITTED!r}, which only a run.toml has. Remove that line.")
    return from_content(where, content)


def from_content(where: str, content: Mapping[str, Any]) -> FileSettings:
    """Returns the settings in a parsed file. Those of a ``run.toml`` don't include the worker's and the run's name.

    Raises:
        ConfigError: the merge policy isn't text.
    """
    check_policy(where, content)
    of_run = ("program", "name", toml.DATA) if "program" in content else ()
    return FileSettings(where, {name: value for name, value in content.items() if name not in of_run})


def check_policy(where: str, content: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the merge policy in the file, if there is one, is text."""
    if not isinstance(content.get("policy", ""), str):
        raise ConfigError(f"{where}: policy must be text, the name of a merge policy or module:Class.")


def defaults_from(
    file: FileSettings, worker: type | None, policy: str, kinds: Iterable[type], arguments: list[str]
) -> Defaults:
    """Converts a file's settings to the types of the flags.

    Args:
        worker: the worker's class, if there is one.
        policy: the merge policy of the run. The file's arguments of another policy must have been removed.
        kinds: the settings classes of the subcommand; settings of other classes are ignored.
        arguments: the flags given in addition.

    Raises:
        ConfigError: a name is unknown, a value has the wrong type, or no flag gives a secret that the file leaves out.
    """
    where, content = file.where, dict(file.content)
    omitted = content.pop(OMITTED, [])
    of_policy = check_names(content.pop(TABLE, {}), policy, where)
    of_worker = content.pop("worker", {})
    if not isinstance(of_worker, dict):
        raise ConfigError(f"{where}: worker must be a table [worker] of the worker's own settings.")
    policy_types = {name: (flag_type(a), a.default) for name, a in policy_arguments(policy).items()}
    worker_types: dict[str, tuple[Any, Any]] = {}
    if worker:
        from lte_ray.worker import constructor_parameters

        worker_types = constructor_parameters(worker)
    _check_given(where, omitted, arguments, {"worker": worker_types, "policy": policy_types})
    setting_types: dict[str, tuple[Any, Any]] = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        setting_types |= {
            f.name: (with_units(f, hints[f.name]), f.default) for f in dataclasses.fields(kind) if f.name != TABLE
        }
    ignored = {f.name for kind in SECTIONS for f in dataclasses.fields(kind)} - set(setting_types)
    lengths = ("steps", *LENGTHS)
    if _given_flags(arguments) & {flag(name) for name in lengths}:  # it replaces the file's, which may have another unit
        ignored |= set(lengths)
    content = {name: value for name, value in content.items() if name not in ignored}
    return Defaults(
        _typed(where, "", content, setting_types),
        _typed(where, "policy.", of_policy, policy_types),
        _typed(where, "worker.", of_worker, worker_types),
    )


def _given_flags(arguments: Iterable[str]) -> set[str]:
    return {argument.partition("=")[0].replace("_", "-") for argument in arguments}


def _typed(where: str, prefix: str, values: Mapping[str, Any], known: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    typed = {}
    for name, value in values.items():
        if name not in known:
            hint = suggest(name, known) or f" Known are: {', '.join(sorted(known)) or 'none'}."
            raise ConfigError(f"{where} has an unknown setting {prefix}{name}.{hint}")
        annotation, default = known[name]
        converted = toml.read_value(where, f"{prefix}{name}", value, annotation, default)
        if converted is not default:
            typed[name] = converted
    return typed


def _check_given(where: str, omitted: Any, arguments: list[str], known: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ConfigError unless a flag gives each secret that the file leaves out and that this run takes."""
    if not isinstance(omitted, list) or not all(isinstance(name, str) for name in omitted):
        raise ConfigError(f"{where}: {OMITTED} must be a list of names.")
    flags = _given_flags(arguments)
    missing = []
    for entry in omitted:
        table, _, name = entry.partition(".")
        wanted = f"--{table}.{name.replace('_', '-')}"
        if name in known.get(table, {}) and not any(f == wanted or f.startswith(wanted + ".") for f in flags):
            missing.append(wanted)
    if missing:
        raise ConfigError(
            f"{where} leaves out {', '.join(missing)}, since run.toml holds no secrets. Give it again: {missing[0]} VALUE."
            if len(missing) == 1
            else f"{where} leaves out {', '.join(missing)}, since run.toml holds no secrets. Give them again as flags."
        )
