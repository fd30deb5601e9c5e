"""Reads ``run.toml``, the settings of a run, for those who resume, export or watch it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lte_ray.config import toml
from lte_ray.config.toml import NONE
from lte_ray.errors import StorageError
from lte_ray.storage import RUN, RunDirectory

T = TypeVar("T")


@dataclass(frozen=True)
class RunRecord:
    """A parsed ``run.toml``: `content` as TOML has it, flat, the worker's own settings under "worker"."""

    directory: RunDirectory
    content: dict[str, Any]

    @property
    def path(self) -> str:
        """The file's path, for messages."""
        return self.directory.path_to(RUN)

    @property
    def program(self) -> str:
        """The worker. Raises StorageError if the file names none."""
        program = self.content.get("program")
        if not isinstance(program, str) or not program:
            raise StorageError(f"{self.path} is damaged: it names no worker (program).")
        return program

    def settings(self, kind: Callable[..., T]) -> T:
        """The settings of one class. Those that the file lacks have their defaults.

        Raises:
            ConfigError: a setting has the wrong type or is out of range.
            StorageError: the class can't be made from the file's values.
        """
        values = toml.read_fields(kind, self.content, self.path)  # type: ignore[arg-type]
        arguments = values.get("policy_args")
        if isinstance(arguments, dict):
            values["policy_args"] = {name: None if each == NONE else each for name, each in arguments.items()}
        try:
            return kind(**values)
        except TypeError as error:
            raise StorageError(f"{self.path} is damaged: {error}.") from error


def read(directory: RunDirectory) -> RunRecord:
    """Reads ``run.toml``.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    if not directory.exists(RUN):
        raise StorageError(f"There is no run in {directory.display}: it has no {RUN}. Correct --storage or the name.")
    try:
        return RunRecord(directory, toml.parse(directory.read(RUN)))
    except ValueError as error:
        raise StorageError(f"{directory.path_to(RUN)} is damaged: {error}.") from error
