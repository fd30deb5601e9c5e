"""Data in stores and on web servers: found there, and copied to each node once, into the user's cache folder.

A copy belongs to one state of the data. Its name depends on the address and on what the server says of each file: its size, and
its ETag or when it was changed. All processes of a node use the same copy; one of them makes it while the others wait. It
appears when it is complete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import fsspec
import platformdirs

from lte_ray.errors import DataError, StorageError
from lte_ray.redaction import without_credentials
from lte_ray.storage.filesystem import CREDENTIAL_VARIABLES, PYARROW_SCHEMES, check_inside, open_filesystem
from lte_ray.storage.retry import DEFAULT_PATIENCE, retry

T = TypeVar("T")

PATTERN = "*?["
"""Characters that make a path a pattern."""

PARALLEL = 8
"""Files of a folder that are copied at a time."""

LOG_AFTER = 10.0
"""Seconds for which another process may copy before the log says that this one waits."""

STATES = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "updated", "created")
"""Keys under which filesystems say that a file is another one than before: the first that is there counts."""

FORBIDDEN = ("ACCESS_DENIED", "403", "401", "Forbidden", "Unauthorized", "PERMISSION_DENIED", "UNAUTHENTICATED")
"""Words in errors that mean a lack of rights."""

log = logging.getLogger("lte_ray")


@dataclass(frozen=True)
class DataFile:
    """One file of some data.

    Attributes:
        name: its path or URI, for messages.
        path: its path in `filesystem`, one of fsspec's.
        size: in bytes, if known.
        state: a text that changes when the file does.
    """

    name: str
    path: str
    filesystem: Any
    size: int | None
    state: str

    @property
    def suffix(self) -> str:
        """The end of its name, ".jsonl"."""
        return Path(self.path.partition("?")[0]).suffix.lower()

    def local(self) -> Path:
        """Returns where it is on this machine, and copies it first if it isn't here. Raises DataError if that fails."""
        return _copied((self,)) / _base_name(self) if _is_remote(self.name) else Path(self.path)


def local_copy(source: str | os.PathLike[str]) -> str:
    """Returns the path of data on this machine: a file, or a folder with all that is in it.

    Data in a store or on a web server (``s3://``, ``gs://``, ``az://``, ``https://`` ...) are copied to this node once, however
    many processes ask for them. They are copied again when the server says that they have changed.

    Args:
        source: a path, which is returned as it is, or a URI of a file or a folder. Web servers have no folders.

    Raises:
        DataError: there is nothing, it may not be read, a library is missing, or the disk is too small.
    """
    place = os.fspath(source)
    if not _is_remote(place):
        return str(Path(place.removeprefix("file://")).expanduser())
    files, folder = find_data(place)
    if not files:
        raise DataError(f"There is no file {without_credentials(place)}. Correct the address.")
    if not folder and len(files) > 1:
        raise DataError(f"{without_credentials(place)} names {len(files)} files. Give one file, or the folder that has them.")
    if not folder:
        return str(files[0].local())
    return str(_copied(files, folder))


def find_data(source: str) -> tuple[list[DataFile], str]:
    """Finds the files that a source names: a file, a folder with everything in it, a pattern, or a URI of these.

    Returns:
        The files by their names; none if there is none. In a folder, hidden files and folders are left out. And the path of the
        folder, or '' if it isn't one.

    Raises:
        DataError: the place can't be listed.
    """
    place = source if "://" in source else str(Path(source).expanduser())

    def find() -> tuple[list[DataFile], str]:
        filesystem, path = _open(place)
        if place.startswith(("http://", "https://")):  # what looks like a folder is a page with links
            return [_describe(filesystem, path, path)], ""
        if any(character in path for character in PATTERN) and not filesystem.exists(path):
            found, folder = filesystem.glob(path), ""
        elif filesystem.isdir(path):
            folder = path.rstrip("/")
            found = [file for file in filesystem.find(path) if "/." not in file.removeprefix(folder)]
        else:
            found, folder = [path] if filesystem.exists(path) else [], ""
        return [_describe(filesystem, file, _name(place, filesystem, file)) for file in sorted(found)], folder

    try:
        return _attempt(find, source, "listed")
    except _Missing:
        return [], ""


class _Missing(DataError):
    """There is no such file."""


def _is_remote(source: str) -> bool:
    return "://" in source and not source.startswith("file://")


def _open(place: str) -> tuple[Any, str]:
    """Returns one of fsspec's filesystems, and the path in it."""
    scheme = place.partition("://")[0].lower() if "://" in place else "file"
    if scheme == "file" or scheme not in PYARROW_SCHEMES:
        filesystem, path = fsspec.core.url_to_fs(place)
        return filesystem, str(path)
    from fsspec.implementations.arrow import ArrowFSWrapper

    inner, path = open_filesystem(place)
    return ArrowFSWrapper(inner, skip_instance_cache=True), path


def _name(place: str, filesystem: Any, path: str) -> str:
    if "://" not in place:
        return path
    scheme = place.partition("://")[0]
    return f"{scheme}://{path}" if scheme.lower() in PYARROW_SCHEMES else str(filesystem.unstrip_protocol(path))


def _describe(filesystem: Any, path: str, name: str) -> DataFile:
    info = filesystem.info(path)
    state = next((f"{key} {info[key]}" for key in STATES if info.get(key)), "")
    return DataFile(without_credentials(name), path, filesystem, info.get("size"), state)


def _attempt(call: Callable[[], T], source: str, done: str) -> T:
    """Makes the call, again and again while storage fails. Raises DataError with one sentence."""
    shown = without_credentials(source)
    try:
        return retry(call, f"reading {shown}", f"{shown} can't be {done}", DEFAULT_PATIENCE if _is_remote(source) else 0.0)
    except StorageError as error:
        words = " ".join(f"{type(each).__name__} {each}" for each in _causes(error))
        if any(word in words for word in FORBIDDEN) or isinstance(error.__cause__, PermissionError):
            variables = CREDENTIAL_VARIABLES.get(source.partition("://")[0].lower())
            advice = f" Give credentials by the environment of every node ({variables})." if variables else ""
            raise DataError(f"{shown} can't be {done}: there is no right to it.{advice}") from error
        if isinstance(error.__cause__, FileNotFoundError):
            raise _Missing(f"There is no file {shown}.") from error
        raise DataError(str(error)) from error
    except ImportError as error:
        raise DataError(f"{shown} needs another package: {error}. Install it on every node.") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# -- copies ------------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where copies are kept on this machine: ``lte-ray/data`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    return Path(platformdirs.user_cache_dir("lte-ray")) / "data"


def _copied(files: Sequence[DataFile], root: str | None = None) -> Path:
    """Returns the folder that has copies of these files, by their paths below `root`, or by their names alone."""
    facts = [(file.name, file.size, file.state) for file in files]
    folder = cache_folder() / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), files[0].name):
            if not folder.is_dir():
                _copy(files, root, folder)
    except OSError as error:
        raise DataError(f"{files[0].name} can't be copied to {folder.parent}: {error}") from error
    return folder


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=LOG_AFTER)
    except filelock.Timeout:
        log.warning("Waiting for another process of this node, which copies %s.", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _copy(files: Sequence[DataFile], root: str | None, folder: Path) -> None:
    """Copies the files into a new folder. This process has the lock of its name."""
    for left in folder.parent.glob(f"{folder.name}.part*"):  # of a process that died
        shutil.rmtree(left, ignore_errors=True)
    needed, free = sum(file.size or 0 for file in files), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(
            f"{files[0].name} {f'and {len(files) - 1} more files have' if len(files) > 1 else 'has'} {needed:,} bytes, but the "
            f"disk of {folder.parent} has {free:,} left. Free some, or set XDG_CACHE_HOME to a folder on another disk."
        )
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.part"))
    try:
        targets = [part / (_base_name(file) if root is None else _inside(posixpath.relpath(file.path, root))) for file in files]
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(_copy_file, files, targets))
        part.chmod(0o755)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _copy_file(file: DataFile, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _attempt(functools.partial(_download, file, target), file.name, "copied")


def _download(file: DataFile, target: Path) -> None:
    file.filesystem.get_file(file.path, str(target))
    with target.open("rb") as copy:
        os.fsync(copy.fileno())
    size = target.stat().st_size
    if file.size is not None and size != file.size:
        raise OSError(f"{size} of {file.size} bytes have arrived")


def _inside(relative: str) -> str:
    """Returns the path. Raises DataError if it leads out of its folder, as names in stores may."""
    try:
        check_inside(relative)
    except StorageError as error:
        raise DataError(str(error).replace("the run directory", "the folder of the data")) from error
    return relative


def _base_name(file: DataFile) -> str:
    return posixpath.basename(file.path.partition("?")[0].rstrip("/")) or "data"
