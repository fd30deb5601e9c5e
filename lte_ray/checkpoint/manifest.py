"""The manifest: what belongs to a checkpoint. It is written last and makes it complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory

T = TypeVar("T")

FORMAT = 2
"""What is written."""

FORMATS = (1, 2)
"""What is read."""

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
CHECKSUM = "sha256"
LARGEST = 64 * 2**20
"""Bytes that a manifest can have."""

_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})(\.[1-9][0-9]{0,5})?\.safetensors")


class Damaged(StorageError):
    """A file of a checkpoint isn't there or isn't what was written; another checkpoint may be whole."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint, as its manifest lists it: name in the folder, bytes, and checksum in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint: `heads` are those whose state it holds; `facts` are JSON values (step, standings, ledger, ...)."""

    version: int
    heads: tuple[int, ...]
    files: tuple[FileEntry, ...]
    facts: dict[str, Any]
    format: int = FORMAT

    def entry(self, name: str) -> FileEntry | None:
        """The file that stands for `name`, if there is one: its own name may have a number."""
        return next((file for file in self.files if strip_number(file.name) == name), None)


def version_folder(version: int) -> str:
    """Path of a checkpoint in the run directory."""
    return f"{FOLDER}/{version:06d}"


def strip_number(name: str) -> str:
    """A file's name without the number that it has where its version was written before: base.1.safetensors."""
    found = _NAME.fullmatch(name)
    return f"{found[1]}.safetensors" if found else name


def manifest_checksum(content: dict[str, Any]) -> bytes:
    """A manifest as it is written: with the SHA-256 of all the rest (as JSON with sorted keys and without spaces) in it."""
    rest = json.loads(json.dumps({name: value for name, value in content.items() if name != CHECKSUM}))
    return json.dumps({**rest, CHECKSUM: _digest(rest)}, indent=1).encode()


def commit(
    directory: RunDirectory, version: int, heads: Iterable[int], files: Iterable[FileEntry], facts: dict[str, Any]
) -> Manifest:
    """Makes a checkpoint complete by writing its manifest; all its files must be there.

    If there was one of this version, it is replaced in this one moment, and its files are removed afterwards.

    Raises:
        StorageError: a file isn't seen from here, or not as it was written, as happens when nodes write to different disks.
    """
    listed = sorted(files, key=lambda file: file.name)
    content = {"format": FORMAT, **asdict(Manifest(version, tuple(sorted(set(heads))), tuple(listed), facts))}
    for file in listed:
        found = directory.size(f"{version_folder(version)}/{file.name}")
        if found != file.size:
            seen = "isn't seen" if found is None else f"has {found} bytes instead of {file.size}"
            raise StorageError(
                f"{directory.path_to(version_folder(version))}/{file.name} was written on another node but {seen} by the "
                "coordinator. On several nodes --storage must be a place that all of them share (s3://, gs://, NFS)."
            )
    path = f"{version_folder(version)}/{MANIFEST}"
    replaces = directory.exists(path)
    data = manifest_checksum(content)
    directory.write(path, data)
    if replaces:
        with contextlib.suppress(StorageError):  # it takes space, no more
            for name in directory.list_names(version_folder(version)):
                if _NAME.fullmatch(name) and name not in {file.name for file in listed}:
                    directory.delete(f"{version_folder(version)}/{name}")
    return _parsed(json.loads(data), version)


def read_manifest(directory: RunDirectory, version: int) -> Manifest:
    """The manifest of a version.

    Raises:
        Damaged: it isn't there, was torn or edited, or has a format that this release doesn't know.
        StorageError: storage fails.
    """
    path = f"{version_folder(version)}/{MANIFEST}"
    data = read_file(directory, path, LARGEST)
    try:
        content = json.loads(data)
        if _of(int, content["format"]) not in FORMATS:
            found = str(content["format"])[:20]
            raise Damaged(f"{directory.path_to(path)} has format {found}, a format that this release of lte-ray can't read.")
        manifest = _parsed(content, version)
        if manifest.format > 1 or CHECKSUM in content:
            said = content.pop(CHECKSUM)
            if said != _digest(content):
                raise ValueError("its content isn't what its checksum says; it was torn or edited")
        return manifest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{directory.path_to(path)} is damaged: {summarize_error(error)}.") from error


def has_all_heads(manifest: Manifest) -> bool:
    """Whether a run can go on from it. Since format 2 always: a head without a file goes on from its reference.

    In format 1 it must hold every head's state. Raises StorageError if it doesn't say how many there were.
    """
    if manifest.format > 1:
        return True
    try:
        return len(manifest.heads) >= int(manifest.facts["lte"]["num_heads"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        path = f"{version_folder(manifest.version)}/{MANIFEST}"
        raise Damaged(f"{path} is damaged: it doesn't say how many heads there were ({summarize_error(error)}).") from error


def read_file(directory: RunDirectory, path: str, limit: int) -> bytes:
    """A file of a checkpoint; Damaged if it isn't there, isn't a file, has more than `limit` bytes or is a link to nothing."""
    try:
        return directory.read(path, limit)
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            raise Damaged(f"{directory.path_to(path)} can't be read: it isn't there.") from error
        if isinstance(cause, IsADirectoryError | NotADirectoryError):
            raise Damaged(str(error)) from error
        if getattr(cause, "errno", None) in (errno.ELOOP, errno.ENAMETOOLONG):  # names in it are plain: it is a link
            raise Damaged(f"{directory.path_to(path)} can't be read: it is a link that leads nowhere.") from error
        if isinstance(cause, ValueError):
            raise Damaged(f"{directory.path_to(path)} is damaged: {summarize_error(cause)}.") from error
        raise


def summarize_error(error: BaseException) -> str:
    """An error on foreign content in one short line: what it quotes may be anything."""
    text = "".join(c if c.isprintable() else "?" for c in f"{type(error).__name__}: {error}")
    return text[:200].rstrip(".")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parsed(content: dict[str, Any], version: int) -> Manifest:
    files = [FileEntry(_of(str, f["name"]), _of(int, f["size"]), _of(str, f["sha256"])) for f in _of(list, content["files"])]
    heads = [_of(int, head) for head in _of(list, content["heads"])]
    if _of(int, content["version"]) != version:
        raise ValueError(f"it is of version {content['version']!r:.40}")
    for file in files:
        if not _NAME.fullmatch(file.name) or file.size < 0:
            raise ValueError(f"it lists {file.name!r:.40} of {file.size!r:.20} bytes")
    if (
        len({strip_number(file.name) for file in files}) != len(files)
        or len(set(heads)) != len(heads)
        or any(h < 0 for h in heads)
    ):
        raise ValueError("it lists a file or a head twice, or a head that can't be")
    return Manifest(version, tuple(heads), tuple(files), _of(dict, content["facts"]), content["format"])


def _of(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, found {value!r:.40}")
    return value
