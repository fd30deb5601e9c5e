"""WORKER, the first argument of subcommands that train: which class it names, and the flags after it."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from lte_ray.cli.flags import HELP, HELP_ALL, Subcommand, parse_sections
from lte_ray.cli.own_flags import constructor_error
from lte_ray.errors import WorkerError
from lte_ray.import_object import load_worker, worker_forms, worker_names


class WorkerArgument(NamedTuple):
    """A worker as the command line names it (empty without one), its class, and the flags after it."""

    program: str
    kind: type | None
    flags: list[str]


def read_worker(arguments: list[str], command: str, *, required: bool = True) -> WorkerArgument:
    """Imports the worker that the first argument names.

    Args:
        command: the subcommand, for the message.
        required: whether there must be one, unless help is asked for.

    Raises:
        WorkerError: there is none, or it can't be imported, or isn't a class.
    """
    if not arguments or arguments[0].startswith("-"):
        if required and not {*HELP, HELP_ALL} & set(arguments):
            raise WorkerError(f"lte-ray {command} needs a WORKER first: {worker_forms(worker_names())}.")
        return WorkerArgument("", None, arguments)
    program, *flags = arguments
    return WorkerArgument(program, check_class(load_worker(program), f"WORKER {program!r}"), flags)


def check_class(worker: Any, what: str) -> type:
    """Returns a worker's class. Raises WorkerError for anything else, which `what` names."""
    if not inspect.isclass(worker):
        raise WorkerError(f"{what} is a {type(worker).__name__}, not a class.")
    return worker


def read_worker_and_settings(arguments: list[str], subcommand: Subcommand) -> tuple[str, Any, dict[type, Any]]:
    """Returns the worker as it is named, the worker, and the settings by their class, for a subcommand that needs a worker.

    Raises:
        ConfigError, WorkerError: as `read_worker` and `parse_sections`.
    """
    program, kind, flags = read_worker(arguments, subcommand.name)
    sections, worker = parse_sections(kind, program or "WORKER", flags, subcommand)
    assert kind is not None  # the help has ended the program
    return program, make_without_settings(program, kind) if worker is None else worker, sections


def make_without_settings(program: str, kind: type) -> Any:
    """Makes a worker that has no settings of its own. Raises WorkerError if its constructor raises."""
    try:
        return kind()
    except Exception as error:
        raise constructor_error(program, error) from error
