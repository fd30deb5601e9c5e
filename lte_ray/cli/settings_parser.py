"""Flags made from settings classes: an argparse parser, and the conversion of its text to the settings' types.

The same conversion serves settings files (`lte_ray.config.toml`), so that both give the same errors.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn

from lte_ray.config import flag, toml
from lte_ray.config.units import with_units
from lte_ray.errors import ConfigError
from lte_ray.redaction import MASK, is_secret, is_sensitive, without_credentials

MAX_WIDTH = 110
"""Columns of the help, at most."""

HIDDEN = "policy_args"
"""The field that no flag sets: the policy's own arguments have flags of their own."""

_WORDS: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT"}
_UNIT_WORDS = {"time": "TIME", "rate": "RATE"}
_NAMES = {"name": "NAME", "policy": "POLICY", "storage": "FOLDER", "json": "FILE", "picture": "FILE", "out": "FILE"}
"""What help shows in place of a value: by type, by unit, and by name."""


def positional(metavar: str, help: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a settings class that is an argument without a flag. With a default it may be left out."""
    return dataclasses.field(default=default, metadata={"help": help, "positional": metavar})


def with_constant(default: Any, help: str, constant: str) -> Any:
    """A field of a settings class whose flag has this value if it is given without one."""
    return dataclasses.field(default=default, metadata={"help": help, "constant": constant})


def with_short(default: Any, help: str, short: str) -> Any:
    """A field of a settings class whose flag has a second spelling, such as ``-o``."""
    return dataclasses.field(default=default, metadata={"help": help, "short": (short,)})


def required(help: str) -> Any:
    """A field of a settings class whose flag must be given."""
    return dataclasses.field(metadata={"help": help})


class SettingsParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are ConfigErrors, and whose help is plain text.

    Args:
        command: the command line up to its flags, e.g. ``lte-ray train WORKER``.
        description: for the help.
    """

    def __init__(self, command: str, description: str = "") -> None:
        self.command = command
        super().__init__(
            prog=command,
            usage=command.replace("%", "%%"),
            description=description.replace("%", "%%"),
            add_help=False,
            allow_abbrev=False,
            formatter_class=_formatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError for what argparse found."""
        raise ConfigError(_describe(self.command, message))

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """Parses the arguments.

        Raises:
            ConfigError: a flag has too many or too few values.
        """
        given, more = self.parse_known_args(arguments)
        if more:
            raise ConfigError(describe_extra(more[0], arguments))
        return given

    def flags(self) -> set[str]:
        """All flags, as the command line writes them."""
        return {option for action in self._actions for option in action.option_strings}

    def add_settings(
        self, group: Any, kind: type, names: Iterable[str] | None = None, defaults: Mapping[str, Any] = {}
    ) -> None:
        """Adds the flags of a settings class.

        Args:
            group: of the help, from `add_argument_group`.
            names: of its fields; by default all.
            defaults: values that replace those of the class, for the help.
        """
        fields, hints = {f.name: f for f in dataclasses.fields(kind)}, flag_types(kind)
        for name in fields if names is None else names:
            if name != HIDDEN:
                _add(group, fields[name], hints[name], (defaults or {}).get(name, fields[name].default))


def _formatter(prog: str) -> argparse.HelpFormatter:
    return _HelpFormatter(prog, max_help_position=28, width=min(MAX_WIDTH, shutil.get_terminal_size().columns - 1))


class _HelpFormatter(argparse.HelpFormatter):
    """Doesn't break lines within flags."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrapped = textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)
        return "\n".join(indent + line for line in wrapped)


def flag_types(kind: type) -> dict[str, Any]:
    """The type of each field's flag."""
    hints = typing.get_type_hints(kind)
    return {f.name: str if hints[f.name] is Any else with_units(f, hints[f.name]) for f in dataclasses.fields(kind)}


def _add(group: Any, field: dataclasses.Field[Any], annotation: Any, default: Any) -> None:
    help = f"{field.metadata['help']}{_describe_default(field.name, default)}".replace("%", "%%")
    if "positional" in field.metadata:
        optional: dict[str, Any] = {} if default is dataclasses.MISSING else {"nargs": "?", "default": argparse.SUPPRESS}
        optional |= {"nargs": "+"} if _is_sequence(annotation) else {}
        group.add_argument(field.name, metavar=field.metadata["positional"], help=help, **optional)
    elif annotation is bool:
        group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
    else:
        group.add_argument(
            *field.metadata.get("short", ()),
            flag(field.name),
            dest=field.name,
            action="extend" if "repeat" in field.metadata else "store",
            default=argparse.SUPPRESS,
            required=default is dataclasses.MISSING,
            nargs="?" if "constant" in field.metadata else _number_of_values(annotation),
            const=field.metadata.get("constant"),
            metavar=field.metadata.get("metavar") or _metavar(field, annotation),
            help=help,
        )


def _options(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return tuple(each for each in typing.get_args(annotation) if each is not type(None)) if union else (annotation,)


def _is_sequence(annotation: Any) -> bool:
    return (typing.get_origin(annotation) or annotation) in (tuple, list, collections.abc.Sequence)


def _number_of_values(annotation: Any) -> str | None:
    several = [_is_sequence(each) for each in _options(annotation)]
    return "*" if all(several) else "+" if any(several) else None


def _metavar(field: dataclasses.Field[Any], annotation: Any) -> str:
    if "unit" in field.metadata:
        return _UNIT_WORDS[field.metadata["unit"]]
    first = _options(annotation)[0]
    if _is_sequence(first):
        first = typing.get_args(first)[0]
    if typing.get_origin(first) is Literal:
        return f"{{{','.join(str(each) for each in typing.get_args(first))}}}"
    return _NAMES.get(field.name) or _WORDS.get(first, "VALUE")


def _describe_default(name: str, default: Any) -> str:
    """`` (default: 2)``; nothing if there is no default, or one that the help text explains."""
    if default is dataclasses.MISSING or default is None or default in ("", ()):
        return ""
    if isinstance(default, bool):
        return f" (default: {'on' if default else 'off'})"
    if isinstance(default, str) and is_sensitive(name, default):
        default = MASK if is_secret(name) else without_credentials(default)
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else f"{default:g}" if _short(default) else default
    return f" (default: {shown})"


def _short(default: Any) -> bool:
    return isinstance(default, float) and float(f"{default:g}") == default


def describe_extra(value: str, arguments: list[str]) -> str:
    """Says which flag stands before a value that belongs to none."""
    before = [each for each in arguments[: arguments.index(value)] if each.startswith("--")] if value in arguments else []
    fewer = f"{before[-1].partition('=')[0]} takes fewer values" if before else "no argument is expected there"
    return f"The value {value!r} is one too many: {fewer}."


def _describe(command: str, message: str) -> str:
    """argparse's complaint in the words of our own."""
    if found := re.match(r"argument (.*?): expected (one|at least one) argument", message):
        return f"{found[1].split('/')[0]} needs {'a' if found[2] == 'one' else 'at least one'} value."
    if found := re.match(r"argument (.*?): ignored explicit argument (.*)", message):
        return f"{found[1].split('/')[0].split(', ')[0]} takes no value, but was given {found[2]}."
    if found := re.match(r"the following arguments are required: (.*)", message):
        program = " ".join(command.split()[:2])
        return f"{program} needs {found[1]}: {command}. See {program} --help."
    return f"{message}."


def convert_given(kind: type, given: argparse.Namespace) -> dict[str, Any]:
    """The parsed flags of one settings class, converted to its fields' types.

    Raises:
        ConfigError: a value has another type.
    """
    positionals = {f.name: f.metadata.get("positional") for f in dataclasses.fields(kind)}
    return {
        name: _convert(positionals.get(name) or flag(name), getattr(given, name), annotation)
        for name, annotation in flag_types(kind).items()
        if hasattr(given, name)
    }


def _convert(name: str, value: Any, annotation: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    try:
        return toml.convert(value, annotation)
    except ValueError as error:
        shown = MASK if is_sensitive(name, value) else repr(value)
        raise ConfigError(f"{name} is {shown}, but it must be {error}.") from None


def parse_arguments(kind: type, command: str, arguments: list[str]) -> Any:
    """Parses the arguments of a subcommand that has one settings class, whose docstring describes it.

    Prints the help and exits with 0 for ``--help``.

    Raises:
        ConfigError: a flag is unknown, or a value is missing or has the wrong type.
    """
    from lte_ray.cli.hints import check_known

    parser = SettingsParser(command, " ".join((kind.__doc__ or "").split()))
    fields = dataclasses.fields(kind)
    named = [f.name for f in fields if "positional" not in f.metadata]
    parser.add_settings(parser.add_argument_group("arguments"), kind, [f.name for f in fields if f.name not in named])
    flags = parser.add_argument_group("flags")
    parser.add_settings(flags, kind, named)
    flags.add_argument("-h", "--help", action="help", help="Show this help.")
    arguments = ["--help" if argument == "--help-all" else argument for argument in normalize(arguments)]
    if "--help" not in arguments:
        check_known(arguments, parser.flags(), " ".join(command.split()[:2]))
    return kind(**convert_given(kind, parser.parse(arguments)))


def normalize(arguments: list[str]) -> list[str]:
    """Flags with dashes, also where they are given with underscores: ``--num_heads``."""
    parts = ((argument, argument.partition("=")) for argument in arguments)
    return [f"{p[0].replace('_', '-')}{p[1]}{p[2]}" if argument.startswith("--") else argument for argument, p in parts]
