"""The flags of ``lte-ray train`` and ``simulate``, derived from the settings classes, which also serve TOML and Python."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import select
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from lte_ray.cli import toml_config
from lte_ray.cli.policy_flags import TABLE, chosen_policy, parsed_arguments, policy_section
from lte_ray.cli.toml_config import Defaults, FileSettings
from lte_ray.config import SECTIONS, FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.config.units import with_units
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.redaction import MASK, is_secret, is_sensitive, without_credentials
from lte_ray.worker import constructor_parameters

SECTION_TITLES: Mapping[type, str] = {
    LTEConfig: "heads",
    MergeConfig: "merging",
    TrainConfig: "training",
    PlacementConfig: "resources",
    FailureConfig: "failures",
    StorageConfig: "run",
}


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The validated settings of the command line and the TOML file."""

    lte: LTEConfig
    merge: MergeConfig
    train: TrainConfig
    placement: PlacementConfig
    failure: FailureConfig
    storage: StorageConfig
    worker: Any


def parse(worker: type | None, program: str, arguments: list[str], file: FileSettings | None = None) -> Parsed:
    """Parses the flags of ``lte-ray train``.

    Args:
        worker: the worker's class, if there is one.
        program: how the command line names it.
        arguments: the flags. They win over the TOML file that ``--config`` names.
        file: the settings file without ``--config``.

    Prints help and exits with 0 for ``--help``. Prints what is wrong and exits with 2 for an unknown flag or a value of the
    wrong type.

    Raises:
        ConfigError: a value is out of range, or the TOML file is missing, malformed or has unknown keys.
        WorkerError: the worker's constructor has parameters that can't be flags, or raised.
    """
    sections, instance = parse_sections(worker, program, arguments, TRAIN, file)
    lte, merge, train, placement, failure, storage = (sections[kind] for kind in SECTIONS)
    return Parsed(lte, merge, train, placement, failure, storage, instance)


@dataclasses.dataclass(frozen=True)
class Subcommand:
    """A subcommand with settings: its name, its description for ``--help``, and its settings classes with their titles."""

    name: str
    description: str
    titles: Mapping[type, str]


def parse_sections(
    worker: type | None, program: str, arguments: list[str], subcommand: Subcommand, file: FileSettings | None = None
) -> tuple[dict[type, Any], Any]:
    """Parses the flags of any subcommand, as `parse`.

    Returns:
        The settings by their class, and the worker, which is None if it has no settings of its own.
    """
    config, rest = _split_config(arguments)
    file = toml_config.read(config) if config else file
    in_file = file.content.get("policy", MergeConfig().policy) if file else MergeConfig().policy
    policy = chosen_policy(rest, in_file)
    if file and policy != in_file:  # the file's arguments are another policy's
        file.content.pop(TABLE, None)
    defaults = toml_config.defaults_from(file, worker, policy, subcommand.titles, rest) if file else toml_config.Defaults()

    def parse_flags(defaults: Defaults) -> Any:
        flags_class = _flags_class(worker, policy, subcommand, defaults)
        name = f"lte-ray {subcommand.name} {program}"
        return tyro.cli(flags_class, prog=name, args=rest, description=subcommand.description)

    try:
        flags = _hiding_secrets(parse_flags, defaults)
    except tyro.constructors.UnsupportedTypeAnnotationError as error:
        raise WorkerError(f"{program}: the constructor's parameters can't all be flags; annotate them: {error}") from error
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_stdout_closed():  # of the help
            raise
        raise _constructor_error(program, error) from error
    policy_values: dict[type, dict[str, Any]] = {MergeConfig: {TABLE: parsed_arguments(flags)}}
    sections = {
        kind: _make_section(kind, getattr(flags, title), policy_values.get(kind, {}))
        for kind, title in subcommand.titles.items()
    }
    return sections, getattr(flags, "worker", None)


def _hiding_secrets(parse_flags: Callable[[Defaults], Any], defaults: Defaults) -> Any:
    """Parses with these defaults. What tyro prints before it exits names defaults, so that shows ``***`` for secrets."""
    masked = Defaults(*(_without_secrets(values) for values in (defaults.settings, defaults.policy, defaults.worker)))
    if masked == defaults:
        return parse_flags(defaults)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            flags = parse_flags(defaults)
    except SystemExit:
        parse_flags(masked)  # prints the same, and exits
        raise
    sys.stdout.write(output.getvalue())  # of the worker's constructor
    return flags


def _without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without secrets: masked in text, left out otherwise."""
    shown = {}
    for name, value in values.items():
        if not is_sensitive(name, value):
            shown[name] = value
        elif isinstance(value, str):
            shown[name] = MASK if is_secret(name) else without_credentials(value)
    return shown


def is_stdout_closed() -> bool:
    """Whether the reader of standard output has ended, as in `lte-ray train --help | head`."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def make_without_settings(program: str, kind: type) -> Any:
    """Makes a worker that has no settings of its own. Raises WorkerError if its constructor raises."""
    try:
        return kind()
    except Exception as error:
        raise _constructor_error(program, error) from error


def _constructor_error(program: str, error: Exception) -> WorkerError:
    return WorkerError(f"{program} could not be constructed: {type(error).__name__}: {error}")


_DESCRIPTION = (
    "Trains WORKER with LoRA heads that are Ray actors. A TOML file can give the same settings: --config FILE.toml, with "
    "underscores in the names (num_heads = 4), the worker's own in a table [worker], and the merge policy's own in a table "
    "[policy_args]. Flags win over the file."
)

TRAIN = Subcommand("train", _DESCRIPTION, SECTION_TITLES)


def _flags_class(worker: type | None, policy: str, subcommand: Subcommand, defaults: Defaults) -> type:
    """A dataclass of sections, one for each settings class, the policy's arguments and the worker's, for tyro."""
    sections: list[tuple[str, Any]] = []
    for kind, title in subcommand.titles.items():
        hints = typing.get_type_hints(kind)
        fields = [
            (
                f.name,
                Annotated[
                    str if hints[f.name] is Any else with_units(f, hints[f.name]), tyro.conf.arg(help=f.metadata["help"])
                ],
                dataclasses.field(default=defaults.settings.get(f.name, f.default)),
            )
            for f in dataclasses.fields(kind)
            if f.name != TABLE
        ]
        section = dataclasses.make_dataclass(f"{kind.__name__}Flags", fields)
        section.__doc__ = (kind.__doc__ or "").split("``")[0].strip()
        sections.append((title, Annotated[section, tyro.conf.arg(name="")]))
    of_policy = policy_section(policy, defaults.policy)
    if of_policy is not None:
        sections.append(of_policy)
    if worker is not None and inspect.signature(worker).parameters:
        sections.append(("worker", _with_defaults(worker, defaults.worker)))
    return dataclasses.make_dataclass("Flags", sections)


def _with_defaults(worker: type, defaults: Mapping[str, Any]) -> Any:
    """The worker's constructor with other defaults, if there are some."""
    if not defaults:
        return worker
    fields = dataclasses.fields(worker) if dataclasses.is_dataclass(worker) else ()
    if fields:  # tyro would look for the names in annotations of a base class in the module of the worker
        annotations, known = worker.__init__.__annotations__, constructor_parameters(worker)  # type: ignore[misc]
        annotations.update({name: known[name][0] for name in annotations if known.get(name, (Any,))[0] is not Any})
    # In its signature a dataclass shows the default of a field with a factory as a placeholder.
    factory_defaults = {f.name: f.default_factory() for f in fields if f.init and f.default_factory is not dataclasses.MISSING}
    return functools.partial(worker, **factory_defaults | dict(defaults))


def _make_section(kind: type, section: Any, more: dict[str, Any]) -> Any:
    return kind(**more | {f.name: getattr(section, f.name) for f in dataclasses.fields(kind) if f.name not in more})


def _split_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file that ``--config`` names, and the other arguments."""
    rest, config = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config = next(remaining, None)
            if config is None or config.startswith("--"):
                raise ConfigError("--config needs a file: --config FILE.toml.")
        elif argument.startswith("--config="):
            config = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return (Path(config) if config is not None else None), rest
