"""Imports a user's class from ``package.module:Class`` or ``path/to/file.py:Class``, or by its short name."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from lte_ray.config import suggest
from lte_ray.errors import LTEError, WorkerError
from lte_ray.file_modules import load_file
from lte_ray.job_folder import job_folder
from lte_ray.recipes import RECIPES

WORKERS = "lte_ray.workers"
"""Group of entry points by which installed packages give their workers short names: ``name = "module:Class"``."""

POLICIES = "lte_ray.policies"
"""The same for merge policies."""


def is_object_path(spec: str) -> bool:
    """Whether `spec` has the form of `load_object`'s argument."""
    return ":" in spec


def absolute(spec: str) -> str:
    """`spec` in a form that is valid in every folder: a file's path becomes absolute, anything else stays.

    The folder of a job of Ray is gone after it, so a path there becomes relative to that folder. Another job with the same
    files finds the file then, and so does a process in the folder that was sent.
    """
    place, _, name = spec.rpartition(":")
    if not place.endswith(".py"):
        return spec
    path = os.path.abspath(place)
    folder = job_folder(path)
    return f"{path if folder is None else os.path.relpath(path, folder)}:{name}"


def worker_names() -> dict[str, list[str]]:
    """Returns what each short name of a worker means: a recipe's ``module:Class``, or that of an installed package."""
    return entry_points(WORKERS, RECIPES)


def entry_points(group: str, builtin: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Returns the ``module:Class`` that the entry points of a group give each name. Several packages may give one name."""
    names: dict[str, list[str]] = {name: [spec] for name, spec in (builtin or {}).items()}
    for point in importlib.metadata.entry_points(group=group):
        if point.value not in names.setdefault(point.name, []):  # an editable package may be listed twice
            names[point.name].append(point.value)
    return names


def from_entry_points(name: str, names: Mapping[str, list[str]], *, what: str, error: type[LTEError]) -> str:
    """Returns the ``module:Class`` of a name in what `entry_points` returned.

    Raises:
        error: several packages give this name to different objects.
    """
    first, *others = names[name]
    if others:
        raise error(f"{what} {name!r} is the name of {len(others) + 1}: {', '.join(names[name])}. Give the one that you mean.")
    return first


def load_worker(program: str, *, what: str = "WORKER") -> Any:
    """Imports a worker by a short name, ``package.module:Class`` or ``path/to/file.py:Class``.

    Args:
        program: which worker.
        what: how the user knows it, for messages.

    Raises:
        WorkerError: as `load_object`, or there is no such name.
    """
    if is_object_path(program) or program.endswith(".py") or os.sep in program:
        return load_object(program, what=what, error=WorkerError)
    names = worker_names()
    if program not in names:
        raise WorkerError(f"{what} is {program!r}, but it must be {worker_forms(names)}.{suggest(program, names)}")
    spec = from_entry_points(program, names, what=what, error=WorkerError)
    return load_object(spec, what=what, error=WorkerError)


def worker_forms(names: Iterable[str]) -> str:
    """Says how a worker can be named."""
    return f"a ready-made worker ({', '.join(names)}), package.module:Class or path/to/file.py:Class"


def load_object(spec: str, *, what: str, error: type[LTEError], functions: bool = False) -> Any:
    """Imports the object that `spec` names.

    Args:
        spec: ``package.module:Class`` (the current folder counts, too) or ``path/to/file.py:Class``.
        what: how the user knows it, for messages.
        error: the error type to raise.
        functions: whether a function may be meant, too, so that the message lists the module's.

    Raises:
        error: there is no such module, file or name, or the module raised while it was imported (chained).
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise error(f"{what} is {spec!r}, but it must be package.module:Class or path/to/file.py:Class.")
    try:
        module = _load_file(place) if place.endswith(".py") else _import(place)
    except _NotFound as reason:
        raise error(f"{what} {spec!r}: {reason}") from None
    except Exception as reason:
        raise error(f"{what} {spec!r}: importing {place} raised {type(reason).__name__}: {reason}") from reason
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        kinds = (type, FunctionType) if functions else type
        known = [n for n, v in vars(module).items() if isinstance(v, kinds) and v.__module__ == module.__name__]
        listed = f"Its classes {'and functions ' if functions else ''}are: {', '.join(known) or 'none'}."
        raise error(f"{what} {spec!r}: {place} has no {name}.{suggest(name, known)} {listed}")
    return value


class _NotFound(Exception):
    pass


def _import(name: str) -> ModuleType:
    # A console script has its own folder on sys.path, `python -m` has the user's current folder. Behave like the latter.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not (name == missing.name or name.startswith(missing.name + ".")):
            raise  # the module exists, but something that it imports doesn't
        raise _NotFound(
            f"there is no module {missing.name} on Python's path or in {os.getcwd()}. "
            "Give its full dotted name, or the path of a file that ends in .py."
        ) from None


def _load_file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise _NotFound(f"there is no file {path}.")
    return load_file(path)
