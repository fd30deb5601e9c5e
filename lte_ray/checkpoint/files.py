"""The safetensors files of a checkpoint: written under free names, read only if they are what the manifest lists."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

import safetensors.torch
from torch import Tensor

from lte_ray.checkpoint.manifest import MANIFEST, Damaged, FileEntry, Manifest, folder, read_file, short
from lte_ray.storage import RunDirectory

BASE = "base.safetensors"
POLICY = "policy.safetensors"
REFERENCES = "references.safetensors"


def head_file(head: int) -> str:
    """Name of a head's file."""
    return f"head-{head:04d}.safetensors"


def write_tensors(
    directory: RunDirectory, version: int, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> FileEntry:
    """Writes one file of a checkpoint; under another name if a complete one has this file already."""
    copies = {key: value.detach().clone().contiguous() for key, value in tensors.items()}  # they may share memory
    data = safetensors.torch.save(copies, metadata or None)  # of no tensors and {} it makes a broken header
    name = _free(directory, version, name)
    directory.write(f"{folder(version)}/{name}", data)
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def read_bytes(directory: RunDirectory, manifest: Manifest, name: str) -> bytes:
    """The bytes of a file. Raises Damaged if they aren't there or aren't what the manifest lists."""
    expected = manifest.entry(name)
    if expected is None:
        path = f"{directory.at(folder(manifest.version))}/{name}"
        raise Damaged(f"{path} can't be read: the checkpoint doesn't hold it.")
    path = f"{folder(manifest.version)}/{expected.name}"
    data = read_file(directory, path, expected.size)
    if len(data) != expected.size or hashlib.sha256(data).hexdigest() != expected.sha256:
        raise Damaged(f"{directory.at(path)} is damaged: its content isn't what the manifest lists.")
    return data


def read_tensors(directory: RunDirectory, manifest: Manifest, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its metadata. Raises Damaged whatever is wrong with it, also where its checksum fits."""
    data = read_bytes(directory, manifest, name)
    try:
        metadata = _metadata(data)
        return safetensors.torch.load(data), metadata
    except Exception as error:  # content may be anything, and the reader's errors are of many kinds
        raise damaged(directory, manifest, name, error) from error


def damaged(directory: RunDirectory, manifest: Manifest, name: str, error: BaseException | str) -> Damaged:
    """The error that says what is wrong with a file."""
    entry = manifest.entry(name)
    path = f"{directory.at(folder(manifest.version))}/{entry.name if entry else name}"
    return Damaged(f"{path} is damaged: {error if isinstance(error, str) else short(error)}.")


def _metadata(data: bytes) -> dict[str, str]:
    """The texts in a safetensors header, whose length its first 8 bytes are. Raises ValueError."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"its header should have {size} bytes, but the file has {len(data)}")
    header: Any = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header isn't one of safetensors")
    return metadata


def _free(directory: RunDirectory, version: int, name: str) -> str:
    """The name, with a number if a complete checkpoint of this version has it already: that one stays whole until `commit`."""
    if not directory.exists(f"{folder(version)}/{MANIFEST}"):
        return name
    taken = set(directory.names(folder(version)))
    stem = name.removesuffix(".safetensors")
    numbered = (f"{stem}.{number}.safetensors" for number in itertools.count(1))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)
