"""The manifest of a checkpoint: what belongs to it. It is written last and makes the checkpoint complete."""

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
from lte_ray.storage.checkpoints import MANIFEST, version_folder

T = TypeVar("T")

FORMAT = 2
"""The format that is written."""

FORMATS = (1, 2)
"""The formats that can be read."""

CHECKSUM = "sha256"

MAX_MANIFEST_BYTES = 64 * 2**20

_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})(\.[1-9][0-9]{0,5})?\.safetensors")


class Damaged(StorageError):
    """A file of a checkpoint is missing or isn't what was written. Another checkpoint may be intact."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint, as its manifest lists it: name in the folder, bytes, and checksum in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        version: the base version.
        heads: those whose state the checkpoint holds.
        files: all its files.
        facts: JSON values (step, standings, ledger, ...).
        format: 1 or 2.
    """

    version: int
    heads: tuple[int, ...]
    files: tuple[FileEntry, ...]
    facts: dict[str, Any]
    format: int = FORMAT

    def entry(self, name: str) -> FileEntry | None:
        """The file of this name, if there is one. The name on storage may have a number (`strip_number`)."""
        return next((file for file in self.files if strip_number(file.name) == name), None)


def strip_number(name: str) -> str:
    """A file's name without the number that it has if its version was written before: ``base.1.safetensors``."""
    match = _NAME.fullmatch(name)
    return f"{match[1]}.safetensors" if match else name


def serialize_manifest(content: dict[str, Any]) -> bytes:
    """Serializes a manifest with the SHA-256 of its other content (JSON with sorted keys and without spaces) in it."""
    rest = json.loads(json.dumps({name: value for name, value in content.items() if name != CHECKSUM}))
    return json.dumps({**rest, CHECKSUM: _digest(rest)}, indent=1).encode()


def commit(
    directory: RunDirectory, version: int, heads: Iterable[int], files: Iterable[FileEntry], facts: dict[str, Any]
) -> Manifest:
    """Makes a checkpoint complete by writing its manifest. All its files must have been written.

    A complete checkpoint of this version is replaced in this one moment, and its files are removed afterwards.

    Raises:
        StorageError: a file is missing or has another size here, as happens when nodes write to different disks.
    """
    listed = sorted(files, key=lambda file: file.name)
    content = {"format": FORMAT, **asdict(Manifest(version, tuple(sorted(set(heads))), tuple(listed), facts))}
    for file in listed:
        size = directory.size(f"{version_folder(version)}/{file.name}")
        if size != file.size:
            seen = "isn't seen" if size is None else f"has {size} bytes instead of {file.size}"
            raise StorageError(
                f"{directory.path_to(version_folder(version))}/{file.name} was written on another node but {seen} by the "
                "coordinator. On several nodes --storage must be a place that all of them share (s3://, gs://, NFS)."
            )
    path = f"{version_folder(version)}/{MANIFEST}"
    replaces = directory.exists(path)
    data = serialize_manifest(content)
    directory.write(path, data)
    if replaces:
        with contextlib.suppress(StorageError):  # old files only take space
            for name in directory.list_names(version_folder(version)):
                if _NAME.fullmatch(name) and name not in {file.name for file in listed}:
                    directory.delete(f"{version_folder(version)}/{name}")
    return _parse(json.loads(data), version)


def read_manifest(directory: RunDirectory, version: int) -> Manifest:
    """Reads the manifest of a version.

    Raises:
        Damaged: it is missing, was torn or edited, or has a format that this release can't read.
        StorageError: storage fails.
    """
    path = f"{version_folder(version)}/{MANIFEST}"
    data = read_file(directory, path, MAX_MANIFEST_BYTES)
    try:
        content = json.loads(data)
        if _expect(int, content["format"]) not in FORMATS:
            shown = str(content["format"])[:20]
            raise Damaged(f"{directory.path_to(path)} has format {shown}, a format that this release of lte-ray can't read.")
        manifest = _parse(content, version)
        if manifest.format > 1 or CHECKSUM in content:
            checksum = content.pop(CHECKSUM)
            if checksum != _digest(content):
                raise ValueError("its content isn't what its checksum says; it was torn or edited")
        return manifest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{directory.path_to(path)} is damaged: {summarize_error(error)}.") from error


def has_all_heads(manifest: Manifest) -> bool:
    """Whether a run can be resumed from this checkpoint.

    In format 2 it always can: a head without a file resumes from its reference. In format 1 the checkpoint must hold every
    head's state.

    Raises:
        Damaged: the manifest, of format 1, doesn't say how many heads the run had.
    """
    if manifest.format > 1:
        return True
    try:
        return len(manifest.heads) >= int(manifest.facts["lte"]["num_heads"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        path = f"{version_folder(manifest.version)}/{MANIFEST}"
        why = summarize_error(error)
        raise Damaged(f"{path} is damaged: it doesn't say how many heads there were ({why}).") from error


def read_file(directory: RunDirectory, path: str, limit: int) -> bytes:
    """Reads a file of a checkpoint.

    Raises:
        Damaged: it is missing, isn't a file, has more than `limit` bytes, or is a link that leads nowhere.
        StorageError: storage fails.
    """
    try:
        return directory.read(path, limit)
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            raise Damaged(f"{directory.path_to(path)} can't be read: it isn't there.") from error
        if isinstance(cause, IsADirectoryError | NotADirectoryError):
            raise Damaged(str(error)) from error
        if getattr(cause, "errno", None) in (errno.ELOOP, errno.ENAMETOOLONG):  # our names are short, so it is a link
            raise Damaged(f"{directory.path_to(path)} can't be read: it is a link that leads nowhere.") from error
        if isinstance(cause, ValueError):
            raise Damaged(f"{directory.path_to(path)} is damaged: {summarize_error(cause)}.") from error
        raise


def summarize_error(error: BaseException) -> str:
    """An error about foreign content in one short line of printable characters, since the content may be anything."""
    text = "".join(c if c.isprintable() else "?" for c in f"{type(error).__name__}: {error}")
    return text[:200].rstrip(".")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse(content: dict[str, Any], version: int) -> Manifest:
    entries = _expect(list, content["files"])
    files = [FileEntry(_expect(str, f["name"]), _expect(int, f["size"]), _expect(str, f["sha256"])) for f in entries]
    heads = [_expect(int, head) for head in _expect(list, content["heads"])]
    if _expect(int, content["version"]) != version:
        raise ValueError(f"it is of version {content['version']!r:.40}")
    for file in files:
        if not _NAME.fullmatch(file.name) or file.size < 0:
            raise ValueError(f"it lists {file.name!r:.40} of {file.size!r:.20} bytes")
    names = {strip_number(file.name) for file in files}
    if len(names) != len(files) or len(set(heads)) != len(heads) or any(head < 0 for head in heads):
        raise ValueError("it lists a file or a head twice, or a head that can't be")
    return Manifest(version, tuple(heads), tuple(files), _expect(dict, content["facts"]), content["format"])


def _expect(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, found {value!r:.40}")
    return value
