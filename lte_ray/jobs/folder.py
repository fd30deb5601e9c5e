"""The folder that goes with a job: which of its files are sent, how large they are, and one archive of them.

As in Ray, ``.gitignore`` and ``.rayignore`` say what stays here. A few names that no job needs stay here, too, and what can be
recognized without its name: virtual environments and runs of lte-ray.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from lte_ray.errors import ConfigError
from lte_ray.storage import RUN

LIMIT = 512 * 2**20
"""Bytes that Ray takes of a job's folder (RAY_max_grpc_message_size)."""

LARGEST = 3
"""Files that a message about a folder that is too large names."""

NEVER_SENT = {
    ".git", ".hg", ".svn", ".venv", "venv", ".tox", ".nox", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache",
    ".hypothesis", ".import_linter_cache", ".ipynb_checkpoints", ".DS_Store", "node_modules", "ray_results", "wandb", "mlruns",
}  # fmt: skip
"""Names of files and folders that are never sent: repositories, environments, caches, and results of runs."""

IGNORE_GITIGNORE = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"
"""Ray's variable: with the value 1, ``.gitignore`` doesn't count."""

_DATE = (1980, 1, 1, 0, 0, 0)  # of all files, so that equal files give an equal archive, which Ray takes once


@dataclass(frozen=True)
class Folder:
    """What is sent of a folder.

    Attributes:
        root: the folder.
        files: paths in it with "/", and their sizes in bytes.
        left_out: files and folders that aren't sent, and why.
    """

    root: Path
    files: dict[str, int]
    left_out: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def why_left_out(self, path: str) -> str | None:
        """Why a path in the folder isn't sent; None if it is, or if there is no such path."""
        return next((why for part in [path, *map(str, PurePosixPath(path).parents)] if (why := self.left_out.get(part))), None)

    def archive(self, target: Path) -> None:
        """Writes the files into a zip file. Equal files give an equal zip file.

        Raises:
            ConfigError: a file can't be read.
        """
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in self.files:
                path = self.root / name
                info = zipfile.ZipInfo(name, _DATE)
                info.compress_type = zipfile.ZIP_DEFLATED
                try:
                    info.external_attr = (path.stat().st_mode & 0xFFFF) << 16
                    archive.writestr(info, path.read_bytes())
                except OSError as error:
                    raise ConfigError(f"{path} can't be sent: {error.strerror or error}.") from error


def read_folder(root: Path) -> Folder:
    """Finds out what is sent of a folder.

    Raises:
        ConfigError: there is no such folder, it is the home directory or the whole disk, or it is too large for Ray.
    """
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise ConfigError(f"--working-dir is {str(root)!r}, but there is no such folder.")
    if root.resolve() in (Path("/"), Path.home().resolve()):
        raise ConfigError(
            f"The folder to send is {root}, which holds more than a job's files. Go to the folder of the worker, or give it "
            "with --working-dir FOLDER. With --working-dir none, nothing is sent."
        )
    folder = Folder(root, {}, {})
    _Walk(folder).visit("", [], {os.path.realpath(root)})
    if folder.size >= LIMIT:
        raise ConfigError(_too_large(folder))
    return folder


class _Walk:
    """Fills in what a folder's files are, folder by folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._names = [".rayignore"] if os.environ.get(IGNORE_GITIGNORE) == "1" else [".gitignore", ".rayignore"]

    def visit(self, relative: str, rules: list[tuple[str, str, GitIgnoreSpec]], above: set[str]) -> None:
        """Reads one folder and those in it.

        Args:
            relative: its path in the root; empty for the root itself.
            rules: the ignore files that count here: the folder that each is in, its name, and its rules.
            above: the folders that this one is in, without links.
        """
        folder = self._folder
        rules = [*rules, *self._rules(relative)]
        try:
            entries = sorted(os.scandir(folder.root / relative), key=lambda entry: entry.name)
        except OSError as error:
            folder.left_out[relative or "."] = f"it can't be read: {error.strerror}"
            return
        for entry in entries:
            path = f"{relative}/{entry.name}".lstrip("/")
            real, is_folder = os.path.realpath(entry.path), entry.is_dir()
            why = _why_not(entry, path, rules) or ("it is a link to a folder around it" if real in above else "")
            if why:
                folder.left_out[path] = why
            elif is_folder:
                self.visit(path, rules, above | {real})
            elif os.access(entry.path, os.R_OK):
                folder.files[path] = entry.stat().st_size
            else:
                folder.left_out[path] = "it can't be read"

    def _rules(self, relative: str) -> Iterator[tuple[str, str, GitIgnoreSpec]]:
        for name in self._names:
            path = self._folder.root / relative / name
            if path.is_file():
                try:
                    yield relative, name, GitIgnoreSpec.from_lines(path.read_text(errors="replace").splitlines())
                except (OSError, ValueError) as error:
                    raise ConfigError(f"{path} can't be read: {error}.") from error


def _why_not(entry: os.DirEntry[str], path: str, rules: list[tuple[str, str, GitIgnoreSpec]]) -> str:
    """Why a file or folder isn't sent; empty if it is."""
    if entry.name in NEVER_SENT:
        return "lte-ray submit never sends it"
    for where, name, spec in rules:
        inside = path.removeprefix(f"{where}/") if where else path
        if spec.match_file(f"{inside}/" if entry.is_dir() else inside):
            return f"{where}/{name} excludes it".lstrip("/")
    if entry.is_dir():
        if os.path.exists(os.path.join(entry.path, "pyvenv.cfg")):
            return "it is a virtual environment"
        if os.path.exists(os.path.join(entry.path, RUN)):
            return "it is a run of lte-ray (lte-ray export makes a file of it)"
        return ""
    return "" if entry.is_file() else "it is no regular file"


def _too_large(folder: Folder) -> str:
    largest = sorted(folder.files.items(), key=lambda each: -each[1])[:LARGEST]
    named = ", ".join(f"{name} ({format_size(size)})" for name, size in largest)
    return (
        f"The folder to send, {folder.root}, has {format_size(folder.size)}, but Ray takes less than {format_size(LIMIT)}. Its "
        f"largest files are {named}. Name what the job doesn't need in a file .rayignore (as in .gitignore), or send a smaller "
        "folder with --working-dir FOLDER. Data belong on a disk that the nodes share, or in an object store."
    )


def format_size(size: float) -> str:
    """Bytes as ``12.3 MB``."""
    from lte_ray.run.display import format_bytes

    return format_bytes(size)
