"""``lte-ray completion SHELL``: prints a script with which a shell completes subcommands, flags and their choices."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lte_ray.cli.settings_parser import SettingsParser, parse_arguments, positional


@dataclass(frozen=True)
class Flags:
    """Prints a script for a shell, which then completes subcommands, flags and their choices. For bash:
    eval "$(lte-ray completion bash)"."""

    shell: Literal["bash", "zsh", "fish"] = positional("SHELL", "bash, zsh or fish.")


def completion(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``completion``.

    Raises:
        ConfigError: the shell isn't one of the three.
    """
    flags = parse_arguments(Flags, "lte-ray completion SHELL", arguments)
    import shtab

    print(shtab.complete(make_parser(), flags.shell))


def make_parser() -> argparse.ArgumentParser:
    """All subcommands with all their flags, except those of workers and policies."""
    from lte_ray.cli import audit, export, logs, new, report, runs, status, stop, submit, watch
    from lte_ray.cli.check import CHECK
    from lte_ray.cli.flags import HELP_ALL, PRINT_CONFIG, RESUME, TRAIN
    from lte_ray.cli.ladder import LADDER
    from lte_ray.cli.plan import PLAN
    from lte_ray.cli.simulate import SIMULATE
    from lte_ray.cli.sweep import SWEEP

    parser = argparse.ArgumentParser(prog="lte-ray", add_help=False)
    subparsers = parser.add_subparsers(parser_class=_Subparser)
    for subcommand in (TRAIN, RESUME, LADDER, SWEEP, CHECK, PLAN, SIMULATE):
        of_command: Any = subparsers.add_parser(subcommand.name, help=subcommand.description.split(".")[0])
        for kind in subcommand.titles:
            of_command.add_settings(of_command, kind)
        for switch in ("--help", HELP_ALL, PRINT_CONFIG):
            of_command.add_argument(switch, action="store_true", help="")
        of_command.add_argument("--config", metavar="FILE", help="a settings file")
        _complete(of_command)
    simple = {
        "audit": audit,
        "export": export,
        "new": new,
        "report": report,
        "runs": runs,
        "status": status,
        "watch": watch,
        "logs": logs,
        "stop": stop,
        "submit": submit,
    }
    for name, flags in {**{name: module.Flags for name, module in simple.items()}, "completion": Flags}.items():
        of_command = subparsers.add_parser(name, help=" ".join((flags.__doc__ or "").split()).split(".")[0])
        of_command.add_settings(
            of_command, flags, [f.name for f in dataclasses.fields(flags) if "positional" not in f.metadata]
        )
        _complete(of_command)
    return parser


class _Subparser(SettingsParser):
    """As argparse makes them."""

    def __init__(self, prog: str, **_: Any) -> None:
        super().__init__(prog)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Gives flags their choices, and files and folders to those that take them."""
    import shtab

    for action in parser._actions:
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if metavar.startswith("{"):
            action.choices = metavar.strip("{}").split(",")
        elif metavar in ("FILE", "FOLDER"):
            action.complete = shtab.FILE if metavar == "FILE" else shtab.DIRECTORY  # type: ignore[attr-defined]
