"""The flags of ``lte-ray train`` and other subcommands, derived from the settings classes, which also serve TOML and Python."""

from __future__ import annotations

import dataclasses
import select
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lte_ray.cli import toml_config
from lte_ray.cli.call import CallOptions, print_json
from lte_ray.cli.hints import check_known
from lte_ray.cli.own_flags import OwnFlags, split_arguments
from lte_ray.cli.policy_flags import TABLE, chosen_policy
from lte_ray.cli.settings_parser import SettingsParser, convert_given, normalize
from lte_ray.cli.toml_config import Defaults, FileSettings
from lte_ray.cli.toml_sections import flatten, format_settings
from lte_ray.config import SECTIONS, FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.config.toml import NONE
from lte_ray.errors import ConfigError
from lte_ray.redaction import MASK, is_secret, is_sensitive, without_credentials

SECTION_TITLES: Mapping[type, str] = {
    LTEConfig: "heads",
    MergeConfig: "merging",
    TrainConfig: "training",
    PlacementConfig: "resources",
    FailureConfig: "failures",
    StorageConfig: "run",
}

HELP, HELP_ALL, PRINT_CONFIG = {"-h", "--help"}, "--help-all", "--print-config"
GENERAL = {
    "--config FILE": "A TOML file with settings, flat or in sections with the titles of --help-all. Flags win over it.",
    PRINT_CONFIG: "Print all settings as a commented file for --config (with --json as JSON), and end.",
    "-h, --help": "Show the common flags.",
    HELP_ALL: "Show all flags by topic.",
}
"""Flags of every subcommand with settings, for the help."""


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
    call: CallOptions = dataclasses.field(default_factory=CallOptions)


@dataclasses.dataclass(frozen=True)
class Subcommand:
    """A subcommand with settings.

    Attributes:
        name: on the command line.
        description: for the help.
        titles: its settings classes, and the titles of their groups in the help.
        common: the settings that ``--help`` shows, in this order; ``--help-all`` shows all.
    """

    name: str
    description: str
    titles: Mapping[type, str]
    common: tuple[str, ...]


TRAIN = Subcommand(
    "train",
    "Trains WORKER with LoRA heads that are Ray actors.",
    {**SECTION_TITLES, CallOptions: "call"},
    ("num_heads", "steps", "merge_iter", "lora_r", "lr", "wait", "policy", "name", "storage", "resume"),
)

RESUME = dataclasses.replace(
    TRAIN,
    name="resume",
    description="Continues RUN, a path, a URI, or a name in --storage, with the settings in its run.toml. Flags win over them.",
    common=("steps", "num_heads", "merge_iter", "wait", "policy", "storage", "address", "json", "quiet"),
)


def parse(
    worker: type | None,
    program: str,
    arguments: list[str],
    file: FileSettings | None = None,
    subcommand: Subcommand = TRAIN,
) -> Parsed:
    """Parses the flags of ``lte-ray train``, or of ``resume``.

    Args:
        worker: the worker's class, if there is one.
        program: how the command line names it.
        arguments: the flags. They win over the TOML file that ``--config`` names.
        file: the settings file without ``--config``.

    Prints help and exits with 0 for ``--help`` and ``--help-all``.

    Raises:
        ConfigError: a flag is unknown, a value has the wrong type or is out of range, or the TOML file is missing, malformed or
            has unknown keys.
        WorkerError: the worker's constructor has parameters that can't be flags, or raised.
    """
    sections, instance = parse_sections(worker, program, arguments, subcommand, file)
    lte, merge, train, placement, failure, storage = (sections[kind] for kind in SECTIONS)
    return Parsed(lte, merge, train, placement, failure, storage, instance, sections[CallOptions])


def parse_sections(
    worker: type | None, program: str, arguments: list[str], subcommand: Subcommand, file: FileSettings | None = None
) -> tuple[dict[type, Any], Any]:
    """Parses the flags of any subcommand, as `parse`.

    Returns:
        The settings by their class, and the worker, which is None if it has no settings of its own.
    """
    config, rest = _split_config(normalize(arguments))
    file = toml_config.read(config) if config else file
    if file is not None:
        content = flatten(file.where, file.content, {**TRAIN.titles, **subcommand.titles})
        toml_config.check_policy(file.where, content)
        file = dataclasses.replace(file, content=content)
    in_file = file.content.get("policy", MergeConfig().policy) if file else MergeConfig().policy
    policy = chosen_policy(rest, in_file)
    if file and policy != in_file:  # the file's arguments are another policy's
        file.content.pop(TABLE, None)
    defaults = toml_config.defaults_from(file, worker, policy, subcommand.titles, rest) if file else Defaults()
    ours, own = split_arguments(rest)
    if {*HELP, HELP_ALL} & set(ours):
        _print_help(subcommand, worker, program, policy, defaults, HELP_ALL in ours)
        raise SystemExit(0)
    printing = PRINT_CONFIG in ours
    ours = [each for each in ours if each != PRINT_CONFIG]
    own_flags = OwnFlags(worker, program, policy, defaults.worker, defaults.policy)
    parser = SettingsParser(f"lte-ray {subcommand.name}")
    for kind in subcommand.titles:
        parser.add_settings(parser, kind)
    check_known(ours, [*parser.flags(), *own_flags.names(), "--config", PRINT_CONFIG, "--help", HELP_ALL], parser.command)
    given = parser.parse(ours)
    sections = {}
    for kind in subcommand.titles:
        of_file = {f.name: defaults.settings[f.name] for f in dataclasses.fields(kind) if f.name in defaults.settings}
        sections[kind] = kind(**of_file | convert_given(kind, given))
    instance, policy_args = own_flags.parse(own)
    if policy_args is not None:
        sections[MergeConfig] = dataclasses.replace(sections[MergeConfig], policy_args=policy_args)
    if printing:
        text = format_settings(sections, subcommand.titles, program, instance)
        if CallOptions in sections and sections[CallOptions].json:
            tables = tomllib.loads(text).items()
            print_json({title: {name: None if v == NONE else v for name, v in table.items()} for title, table in tables})
        else:
            print(text, end="")
        raise SystemExit(0)
    return sections, instance


def _print_help(
    subcommand: Subcommand, worker: type | None, program: str, policy: str, defaults: Defaults, everything: bool
) -> None:
    """Prints the common flags, or all by topic, and those of the worker and the policy."""
    shown = Defaults(*(_without_secrets(values) for values in (defaults.settings, defaults.policy, defaults.worker)))
    parser = SettingsParser(f"lte-ray {subcommand.name} {program} [flags]", subcommand.description)
    if everything:
        for kind, title in subcommand.titles.items():
            about = (kind.__doc__ or "").split(". ")[0].strip().removesuffix(".")
            parser.add_settings(parser.add_argument_group(title, f"{about}."), kind, defaults=shown.settings)
    else:
        fields = {f.name: kind for kind in subcommand.titles for f in dataclasses.fields(kind)}
        group = parser.add_argument_group("common flags")
        for name in subcommand.common:
            parser.add_settings(group, fields[name], [name], shown.settings)
    for title, entries in OwnFlags(worker, program, policy, shown.worker, shown.policy).help():
        group = parser.add_argument_group(title)
        for entry in entries:
            value: dict[str, Any] = {"metavar": entry.metavar} if entry.metavar else {"action": "store_true"}
            group.add_argument(*entry.options, help=entry.help.replace("%", "%%"), **value)
    group = parser.add_argument_group("in general")
    for spelled, help in GENERAL.items():
        options, _, metavar = spelled.replace(",", "").partition(" FILE")
        value = {"metavar": "FILE"} if metavar or " FILE" in spelled else {"action": "store_true"}
        group.add_argument(*options.split(), help=help, **value)
    print(parser.format_help(), end="")


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
