"""Manifests that are damaged: whatever their bytes are, reading gives a manifest that works or a StorageError."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from helpers import make_plan_of, random_flat
from hypothesis import given
from hypothesis import strategies as st

from lte_ray import checkpoint
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory

PLAN = make_plan_of([(3, 4, 1)], [])
PATH = "checkpoints/000007/manifest.json"
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with one checkpoint, whose manifest the tests overwrite."""
    directory = RunDirectory.of(str(tmp_path_factory.mktemp("manifest")), "run")
    base = random_flat(PLAN.base.size, 1, torch.float32)
    files = [checkpoint.write_base(directory, 7, PLAN, base), checkpoint.write_head(directory, 7, 0, {"a": base}, {})]
    checkpoint.commit(directory, 7, (0,), files, {"step": 3})
    return directory


@pytest.fixture(scope="module")
def intact(directory: RunDirectory) -> dict[str, Any]:
    """What the manifest says before anything is damaged."""
    content: dict[str, Any] = json.loads(directory.read(PATH))
    return content


def read(directory: RunDirectory, data: bytes) -> None:
    """Reads the checkpoint with this manifest; only a StorageError may come of it."""
    directory.write(PATH, data)
    with contextlib.suppress(StorageError):
        manifest = checkpoint.read_manifest(directory, 7)
        checkpoint.read_base(directory, manifest, PLAN)
        for head in manifest.heads:
            checkpoint.read_head(directory, manifest, head)


def test_the_intact_manifest_reads(directory: RunDirectory, intact: dict[str, Any]) -> None:
    """The checkpoint that the other tests damage is whole."""
    directory.write(PATH, json.dumps(intact).encode())
    manifest = checkpoint.read_manifest(directory, 7)
    assert (manifest.version, manifest.heads, manifest.facts) == (7, (0,), {"step": 3})
    checkpoint.read_base(directory, manifest, PLAN)


@given(st.binary(max_size=60))
def test_random_bytes_give_a_storage_error(directory: RunDirectory, data: bytes) -> None:
    """Bytes that no manifest has are a StorageError."""
    directory.write(PATH, data)
    with pytest.raises(StorageError, match=r"manifest.json is damaged"):
        checkpoint.read_manifest(directory, 7)


@given(st.integers(0))
def test_a_truncated_manifest_is_damaged(directory: RunDirectory, intact: dict[str, Any], length: int) -> None:
    """Wherever it ends."""
    data = json.dumps(intact).encode()
    directory.write(PATH, data[: length % len(data)])
    with pytest.raises(StorageError, match=r"manifest.json is damaged"):
        checkpoint.read_manifest(directory, 7)


@given(values)
def test_random_json_gives_a_storage_error(directory: RunDirectory, content: object) -> None:
    """JSON of any other form, also what isn't an object at all, is a StorageError."""
    directory.write(PATH, json.dumps(content).encode())
    with pytest.raises(StorageError, match=r"manifest.json is damaged"):
        checkpoint.read_manifest(directory, 7)


@pytest.mark.parametrize("key", ["format", "version", "heads", "files", "facts"])
def test_a_manifest_that_lacks_a_part_is_damaged(directory: RunDirectory, intact: dict[str, Any], key: str) -> None:
    """Each part is needed."""
    directory.write(PATH, json.dumps({k: v for k, v in intact.items() if k != key}).encode())
    with pytest.raises(StorageError, match=f"manifest.json is damaged: KeyError: '{key}'"):
        checkpoint.read_manifest(directory, 7)


def test_a_format_of_another_release_is_refused(directory: RunDirectory, intact: dict[str, Any]) -> None:
    """The error says so, instead of guessing."""
    directory.write(PATH, json.dumps(intact | {"format": checkpoint.FORMAT + 1}).encode())
    with pytest.raises(StorageError, match="a format that this release of lte-ray can't read"):
        checkpoint.read_manifest(directory, 7)


@given(st.sampled_from(["version", "heads", "files"]), values)
def test_a_part_of_a_wrong_type_gives_no_other_error(
    directory: RunDirectory, intact: dict[str, Any], key: str, value: object
) -> None:
    """Reading the checkpoint with anything in place of one part works or is a StorageError."""
    read(directory, json.dumps(intact | {key: value}).encode())


@given(st.sampled_from(["name", "size", "sha256"]), values)
def test_a_file_entry_of_a_wrong_type_gives_no_other_error(
    directory: RunDirectory, intact: dict[str, Any], key: str, value: object
) -> None:
    """The same for each part of a file's entry."""
    first, *rest = intact["files"]
    read(directory, json.dumps(intact | {"files": [first | {key: value}, *rest]}).encode())
