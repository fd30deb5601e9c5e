"""What a sweep makes of its command line: the arguments of each trial, and the command that repeats one."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from lte_ray.cli import toml_config
from lte_ray.cli.call import CallOptions
from lte_ray.cli.flags import HELP, HELP_ALL, SECTION_TITLES, Subcommand
from lte_ray.cli.policy_flags import chosen_policy, policy_arguments
from lte_ray.cli.settings_parser import SettingsParser, convert_given, flag_types, normalize
from lte_ray.cli.toml_sections import flatten
from lte_ray.config import SECTIONS, MergeConfig, flag
from lte_ray.config.sweep import Axis, SweepConfig, Values
from lte_ray.errors import ConfigError
from lte_ray.redaction import MASK, is_sensitive

TITLES = {SweepConfig: "sweep", **SECTION_TITLES, CallOptions: "call"}

NOT_SWEPT = {
    "seed": "give --seeds, which are compared as seeds",
    **dict.fromkeys(("name", "storage", "resume", "overwrite"), "all trials are in one folder"),
    **dict.fromkeys((f.name.replace("_", "-") for f in dataclasses.fields(CallOptions)), "it belongs to the whole call"),
    **dict.fromkeys((f.name.replace("_", "-") for f in dataclasses.fields(SweepConfig)), "it is the sweep's own"),
    **dict.fromkeys(("config", "help", "help-all", "print-config"), "it is no setting"),
}
"""Flags that can't vary, and why."""

TRUE, FALSE = ("true", "on", "yes"), ("false", "off", "no")


def read_sweep(arguments: Sequence[str], subcommand: Subcommand) -> SweepConfig:
    """Returns the settings of the sweep alone: a trial's others are complete only with the values of `over`.

    Raises:
        ConfigError: one has the wrong form, or a flag can't vary, or is given twice.
    """
    arguments = normalize(list(arguments))
    parser = SettingsParser(f"lte-ray {subcommand.name}")
    parser.add_settings(parser, SweepConfig)
    given, rest = parser.parse_known_args(arguments)
    values = convert_given(SweepConfig, given)
    if "over" not in values and (path := _config_file(rest)):
        file = toml_config.read(Path(path))
        content = flatten(file.where, file.content, TITLES)
        values |= {"over": content["over"]} if "over" in content else {}
    config = SweepConfig(**values)
    if not config.over and not {*HELP, HELP_ALL} & set(arguments):
        raise ConfigError("lte-ray sweep needs --over, a flag and its values: --over lora-r=8,16,32.")
    names = {argument.partition("=")[0] for argument in arguments}
    for axis in config.axes:
        if axis.flag in NOT_SWEPT:
            raise ConfigError(f"--over has {axis.flag}, which can't vary: {NOT_SWEPT[axis.flag]}.")
        if any(is_sensitive(axis.flag, value) for value in axis.ends):
            raise ConfigError(f"--over has {axis.flag}, which can't vary: it is a secret, and results name their values.")
        if {f"--{axis.flag}", f"--no-{axis.flag}"} & names:
            raise ConfigError(f"--{axis.flag} and --over {axis.flag}=... are both given. Leave one of them out.")
    return config


def _config_file(arguments: Sequence[str]) -> str:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == "--config":
            return following
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return ""


def switches(worker: type, arguments: list[str]) -> set[str]:
    """Returns the flags that take no value: ``--wait`` and ``--no-wait``. They are without dashes."""
    from lte_ray.worker import constructor_parameters

    names = {flag(n).lstrip("-") for kind in SECTIONS for n, annotation in flag_types(kind).items() if annotation is bool}
    of_worker = {f"worker.{n}" for n, (annotation, _) in constructor_parameters(worker).items() if annotation is bool}
    policy = chosen_policy(arguments, MergeConfig().policy)
    of_policy = {f"policy.{n}" for n, argument in policy_arguments(policy).items() if argument.annotation is bool}
    return names | {name.replace("_", "-") for name in of_worker | of_policy}


def to_arguments(values: Values, known_switches: set[str]) -> list[str]:
    """Returns a configuration as the command line writes it.

    Raises:
        ConfigError: a switch has a value that is neither on nor off.
    """
    arguments = []
    for name, text in values:
        if name in known_switches:
            arguments.append(_switch(name, text))
            continue
        try:
            parts = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"--over has {name}={text!r}, which can't be read: {error}.") from error
        single = len(parts) == 1 and parts[0].startswith("-")
        arguments += [f"--{name}={parts[0]}"] if single else [f"--{name}", *parts]
    return arguments


def _switch(name: str, text: str) -> str:
    if text.lower() not in TRUE + FALSE:
        raise ConfigError(f"--over has {name}={text}, but --{name} is on or off.")
    prefix, dot, rest = name.rpartition(".")
    return f"--{name}" if text.lower() in TRUE else f"--{prefix}{dot}no-{rest}"


def first_values(axes: Iterable[Axis]) -> Values:
    """A configuration: the first value of each list, the lower end of each range."""
    return tuple((axis.flag, axis.ends[0]) for axis in axes)


def covering(axes: Sequence[Axis], configurations: Sequence[Values]) -> list[Values]:
    """Returns a part of the configurations that has each value of each list, and the lowest and the highest of each range."""
    chosen: dict[Values, None] = {}
    for index, axis in enumerate(axes):
        if axis.values:
            firsts = {values[index][1]: values for values in reversed(configurations)}
            chosen |= dict.fromkeys(firsts.values())
        else:
            ordered = sorted(configurations, key=lambda values: float(values[index][1]))
            chosen |= dict.fromkeys((ordered[0], ordered[-1]))
    return list(chosen)


def training_command(program: str, arguments: list[str], more: Sequence[str]) -> str:
    """Returns the ``lte-ray train`` command with these flags of a sweep, without those of the sweep itself, and `more`."""
    left_out = {flag(f.name) for kind in (SweepConfig, CallOptions) for f in dataclasses.fields(kind)}
    left_out |= {flag(name) for name in ("name", "storage", "resume", "overwrite", "seed")}
    kept: list[str] = []
    name, keep = "", True
    for argument in normalize(arguments):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            keep = name not in left_out and f"--{name.removeprefix('--no-')}" not in left_out
            if keep:
                kept.append(f"{name}={MASK}" if equals and is_sensitive(name, value) else argument)
        elif keep:
            kept.append(MASK if is_sensitive(name, argument) else argument)
    return shlex.join(["lte-ray", "train", program, *kept, *more])
