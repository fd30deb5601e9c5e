"""Checkpoints: ``checkpoints/NNNNNN/`` with one file of main weights and one a head, and a manifest written last.

The folder's number is the base version. Every process writes its own file, so nothing large passes through one of
them. A folder without a manifest is no checkpoint. Tensors are safetensors, the rest JSON: nothing executes on load.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor

from lte_ray.errors import StorageError
from lte_ray.layout import Plan
from lte_ray.merging.flat import gather, views
from lte_ray.storage import RunDirectory

T = TypeVar("T")

FORMAT = 1
FOLDER = "checkpoints"
BASE = "base.safetensors"
POLICY = "policy.safetensors"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint, as its manifest lists it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint: `heads` are those whose state it holds; `facts` is for people (step, samples, ...)."""

    version: int
    heads: tuple[int, ...]
    files: tuple[FileEntry, ...]
    facts: dict[str, Any]


def folder(version: int) -> str:
    """Path of a checkpoint in the run directory."""
    return f"{FOLDER}/{version:06d}"


def head_file(head: int) -> str:
    return f"head-{head:04d}.safetensors"


def write_base(directory: RunDirectory, version: int, plan: Plan, base: Tensor) -> FileEntry:
    """Writes the main weights and replicas of `version` under the model's own parameter names."""
    return _write(directory, version, BASE, views(plan.base, base), {})


def write_head(directory: RunDirectory, version: int, head: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> FileEntry:
    """Writes one head's state (`Head.state`)."""
    return _write(directory, version, head_file(head), tensors, {"state": json.dumps(meta)})


def write_policy(directory: RunDirectory, version: int, name: str, tensors: dict[str, Tensor]) -> FileEntry:
    """Writes what the merge policy `name` keeps from one merge to the next."""
    return _write(directory, version, POLICY, tensors, {"policy": name})


def read_policy(directory: RunDirectory, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """What `write_policy` wrote; empty if that was nothing, or another policy's.

    Raises:
        StorageError: the file is damaged.
    """
    if all(file.name != POLICY for file in manifest.files):
        return {}
    tensors, metadata = _read(directory, manifest, POLICY)
    return tensors if metadata.get("policy") == name else {}


def commit(
    directory: RunDirectory, version: int, heads: Iterable[int], files: Iterable[FileEntry], facts: dict[str, Any]
) -> Manifest:
    """Makes a checkpoint complete by writing its manifest; all its files must be there.

    Raises:
        StorageError: a file isn't seen from here, as happens when nodes write to different disks.
    """
    manifest = Manifest(version, tuple(sorted(heads)), tuple(sorted(files, key=lambda f: f.name)), facts)
    for file in manifest.files:
        if not directory.exists(f"{folder(version)}/{file.name}"):
            raise StorageError(
                f"{directory.at(folder(version))}/{file.name} was written on another node but isn't seen by the coordinator. "
                "On several nodes --storage must be a place that all of them share (s3://, gs://, NFS)."
            )
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1)
    directory.write(f"{folder(version)}/{MANIFEST}", text.encode())
    return manifest


def complete(directory: RunDirectory) -> list[int]:
    """Versions of the complete checkpoints, oldest first."""
    return [v for v in _versions(directory) if directory.exists(f"{folder(v)}/{MANIFEST}")]


def remove_incomplete(directory: RunDirectory) -> None:
    """Removes the folders of checkpoints that were never completed."""
    for version in set(_versions(directory)) - set(complete(directory)):
        with contextlib.suppress(OSError):  # left for the next time
            directory.delete(folder(version))


def has_all_heads(manifest: Manifest) -> bool:
    """Whether a run can go on from it: it holds every head's state."""
    return len(manifest.heads) >= int(manifest.facts["lte"]["num_heads"])


def newest_with_all_heads(directory: RunDirectory) -> Manifest | None:
    """The newest complete checkpoint that a run can go on from; damaged ones are passed over."""
    for version in reversed(complete(directory)):
        with contextlib.suppress(StorageError, KeyError, TypeError, ValueError):
            manifest = read_manifest(directory, version)
            if has_all_heads(manifest):
                return manifest
    return None


def remove_after(directory: RunDirectory, version: int) -> None:
    """Removes the checkpoints of later versions, manifest first."""
    for later in [v for v in _versions(directory) if v > version]:
        if directory.exists(f"{folder(later)}/{MANIFEST}"):
            directory.delete(f"{folder(later)}/{MANIFEST}")
        directory.delete(folder(later))


def prune(directory: RunDirectory, keep: int | None) -> None:
    """Removes all but the newest `keep` complete checkpoints, manifest first, so that none is ever half there.

    The newest that a run can go on from stays in any case.
    """
    old = complete(directory)[:-keep] if keep else []
    needed = newest_with_all_heads(directory) if old else None
    for version in old:
        if needed is not None and version == needed.version:
            continue
        with contextlib.suppress(OSError):  # an old one that can't be removed is no reason to end a run
            directory.delete(f"{folder(version)}/{MANIFEST}")
            directory.delete(folder(version))


def read_manifest(directory: RunDirectory, version: int) -> Manifest:
    """Raises StorageError if it isn't there, is damaged, or has a format that this release doesn't know."""
    path = f"{folder(version)}/{MANIFEST}"
    try:
        content = json.loads(directory.read(path))
        if _of(int, content["format"]) != FORMAT:
            raise StorageError(f"{directory.at(path)} has a format that this release of lte-ray can't read.")
        files = [
            FileEntry(_of(str, f["name"]), _of(int, f["size"]), _of(str, f["sha256"])) for f in _of(list, content["files"])
        ]
        heads = [_of(int, head) for head in _of(list, content["heads"])]
        if _of(int, content["version"]) != version:
            raise ValueError(f"it is of version {content['version']}")
        return Manifest(version, tuple(heads), tuple(files), _of(dict, content["facts"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{directory.at(path)} is damaged: {type(error).__name__}: {error}.") from error


def _of(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, found {value!r:.40}")
    return value


def read_base(directory: RunDirectory, manifest: Manifest, plan: Plan) -> Tensor:
    """The base of a checkpoint, flat.

    Raises:
        StorageError: the file is damaged, or is of another model.
    """
    tensors, _ = _read(directory, manifest, BASE)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    expected = {e.name: e.shape for e in plan.base.entries}
    if found != expected:
        differing = sorted(set(found.items()) ^ set(expected.items()))[:4]
        raise StorageError(
            f"{directory.at(folder(manifest.version))} holds another model than the worker builds; they differ in {differing}."
        )
    return gather(plan.base, tensors, next(iter(tensors.values())).dtype)


def read_head(directory: RunDirectory, manifest: Manifest, head: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One head's state, for `Head.load_state`. Raises StorageError if the file is damaged."""
    tensors, metadata = _read(directory, manifest, head_file(head))
    return tensors, json.loads(metadata["state"])


def check_factors(directory: RunDirectory, manifest: Manifest, plans: Sequence[Plan]) -> None:
    """Raises StorageError unless the heads' factors are those of the plans. Their settings are: so one head tells."""
    head = manifest.heads[0]
    tensors, _ = read_head(directory, manifest, head)
    found = {name.removeprefix("factor."): tuple(t.shape) for name, t in tensors.items() if name.startswith("factor.")}
    plan = plans[head]
    expected = {e.name: e.shape for e in plan.contribution.entries[: 2 * len(plan.adapted)]}
    if found != expected:
        differing = sorted({name.rpartition(".")[0] for name, _ in set(found.items()) ^ set(expected.items())})
        more = ", ..." if len(differing) > 8 else ""
        raise StorageError(
            f"{directory.at(folder(manifest.version))} holds heads with other factors; they differ in "
            f"{', '.join(differing[:8])}{more}. If the run was begun when only nn.Linear layers had factors, continue it with "
            "--adapt linear."
        )


def verify(directory: RunDirectory, manifest: Manifest) -> None:
    """Raises StorageError if a file that the manifest lists isn't there or isn't what was written."""
    for file in manifest.files:
        _bytes(directory, manifest, file.name)


def _versions(directory: RunDirectory) -> list[int]:
    return sorted(int(name) for name in directory.names(FOLDER) if name.isdigit())


def _write(directory: RunDirectory, version: int, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> FileEntry:
    data = safetensors.torch.save(
        {k: v.detach().clone().contiguous() for k, v in tensors.items()}, metadata
    )  # may share memory
    directory.write(f"{folder(version)}/{name}", data)
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def _bytes(directory: RunDirectory, manifest: Manifest, name: str) -> bytes:
    path = f"{folder(manifest.version)}/{name}"
    expected = next((f for f in manifest.files if f.name == name), None)
    data = directory.read(path)
    if expected is None or len(data) != expected.size or hashlib.sha256(data).hexdigest() != expected.sha256:
        raise StorageError(f"{directory.at(path)} is damaged: its content isn't what the manifest lists.")
    return data


def _read(directory: RunDirectory, manifest: Manifest, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    data = _bytes(directory, manifest, name)
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return safetensors.torch.load(data), metadata
