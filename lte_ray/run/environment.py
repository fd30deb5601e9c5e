"""``environment.json``: with what, where and how each start of a run was made."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lte_ray
from lte_ray.errors import StorageError
from lte_ray.redaction import MASK, is_secret, redact
from lte_ray.storage import RunDirectory

ENVIRONMENT = "environment.json"

PACKAGES = ("torch", "ray", "numpy")
"""Packages whose versions are always recorded."""

PACKAGES_IN_USE = ("transformers", "peft", "datasets", "tokenizers", "accelerate", "bitsandbytes", "torchvision", "triton")
"""Packages whose versions are recorded if this process has imported them."""

GIT_TIMEOUT = 5.0
"""Seconds that git may take for one answer."""


def describe_environment(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the versions, the machine and the command line of this process, the driver.

    Args:
        folder: of the worker's code, whose git commit is recorded.
    """
    torch = sys.modules.get("torch")
    names = [*PACKAGES, *(name for name in PACKAGES_IN_USE if name in sys.modules)]
    versions = {"lte-ray": lte_ray.__version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    git = describe_git(folder)
    return {
        "versions": versions,
        **({"cuda": cuda} if cuda else {}),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "command": redact_command(sys.argv),
        "folder": os.getcwd(),
        **({"git": git} if git else {}),
    }


def describe_git(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the commit that is checked out in a folder, and whether tracked files differ from it. Empty without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, **({} if changed is None else {"dirty": bool(changed)})}


def _git(folder: str | os.PathLike[str], *arguments: str) -> str | None:
    safe = ("--no-optional-locks", "-c", "core.fsmonitor=false")  # a repository's settings must start no program
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(folder), *safe, *arguments],
            capture_output=True, text=True, timeout=GIT_TIMEOUT, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def worker_folder(worker: Any) -> str:
    """The folder of the file that defines the worker's class, or the current one if it has no file (a notebook)."""
    module = sys.modules.get(type(worker).__module__)
    path = getattr(module, "__file__", None)
    return os.path.dirname(os.path.abspath(path)) if path else os.getcwd()


def redact_command(arguments: Sequence[str]) -> list[str]:
    """The command line without credentials: values of flags with a secret's name, and those in URIs."""
    shown: list[str] = []
    hides_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_flag = argument.startswith("--")
        if hides_next and not is_flag:
            shown.append(MASK)
        else:
            shown.append(f"{name}={MASK}" if is_flag and equals and is_secret(name) else redact(argument))
        hides_next = is_flag and not equals and is_secret(name)
    return shown


@dataclasses.dataclass
class EnvironmentRecord:
    """The file: ``{"id": ..., "starts": [...]}``, one start for each time that the run was started or resumed.

    It is only for people and for sinks: a run never depends on it. Storage that fails costs only the file.

    Attributes:
        id: of the run in sinks. It stays the same when the run is resumed.
    """

    directory: RunDirectory
    id: str
    starts: list[dict[str, Any]]

    @classmethod
    def start(cls, directory: RunDirectory, environment: Mapping[str, Any], **facts: Any) -> EnvironmentRecord:
        """Adds a start to the file.

        Args:
            environment: as `describe_environment` gives it.
            facts: more of this start: from which version it continues, its settings.
        """
        record = cls(dataclasses.replace(directory, patience=min(directory.patience, 5.0)), secrets.token_hex(4), [])
        with contextlib.suppress(StorageError, ValueError, KeyError, TypeError, RecursionError):
            if directory.exists(ENVIRONMENT):
                content = json.loads(directory.read(ENVIRONMENT))
                known, starts = content["id"], content["starts"]
                if isinstance(known, str) and known.isalnum() and isinstance(starts, list):
                    record.id, record.starts = known, starts
        record.starts = [*record.starts, {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **environment, **facts}]
        record.write()
        return record

    def add(self, **facts: Any) -> None:
        """Adds facts to the newest start."""
        self.starts[-1] |= facts
        self.write()

    def write(self) -> None:
        """Writes the file, if storage allows."""
        with contextlib.suppress(StorageError, OSError):
            self.directory.write(ENVIRONMENT, json.dumps({"id": self.id, "starts": self.starts}, indent=1).encode())
