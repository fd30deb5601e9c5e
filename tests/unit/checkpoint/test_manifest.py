"""Damaged manifests: reading any bytes gives a valid manifest or a StorageError."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray import checkpoint
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory
from tests.support.plans import plan_from_shapes, random_flat

PLAN = plan_from_shapes([(3, 4, 1)], [])
PATH = "checkpoints/000007/manifest.json"
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with one checkpoint, whose manifest the tests overwrite."""
    directory = RunDirectory.open(str(tmp_path_factory.mktemp("manifest")), "run")
    base = random_flat(PLAN.base.size, 1, torch.float32)
    files = [checkpoint.write_base(directory, 7, PLAN, base), checkpoint.write_head(directory, 7, 0, {"a": base}, {})]
    checkpoint.commit(directory, 7, (0,), files, {"step": 3})
    return directory


@pytest.fixture(scope="module")
def intact(directory: RunDirectory) -> dict[str, Any]:
    """The content of the manifest before it is damaged."""
    content: dict[str, Any] = json.loads(directory.read(PATH))
    return content


def read(directory: RunDirectory, data: bytes) -> None:
    """Reads the checkpoint with this manifest. It may raise only StorageError."""
    directory.write(PATH, data)
    with contextlib.suppress(StorageError):
        manifest = checkpoint.read_manifest(directory, 7)
        checkpoint.read_base(directory, manifest, PLAN)
        for head in manifest.heads:
            checkpoint.read_head(directory, manifest, head)


def test_the_intact_manifest_reads(directory: RunDirectory, intact: dict[str, Any]) -> None:
    """The checkpoint that the other tests damage is intact."""
    directory.write(PATH, json.dumps(intact).encode())
    manifest = checkpoint.read_manifest(directory, 7)
    assert (manifest.version, manifest.heads, manifest.facts) == (7, (0,), {"step": 3})
    checkpoint.read_base(directory, manifest, PLAN)


@given(st.binary(max_size=60))
def test_random_bytes_give_a_storage_error(directory: RunDirectory, data: bytes) -> None:
    """Bytes that aren't a manifest are a StorageError."""
    directory.write(PATH, data)
    with pytest.raises(StorageError, match=r"manifest.json is damaged"):
        checkpoint.read_manifest(directory, 7)


@given(st.integers(0))
def test_a_truncated_manifest_is_damaged(directory: RunDirectory, intact: dict[str, Any], length: int) -> None:
    """At any length."""
    data = json.dumps(intact).encode()
    directory.write(PATH, data[: length % len(data)])
    with pytest.raises(StorageError, match=r"manifest.json is damaged"):
        checkpoint.read_manifest(directory, 7)


@given(values)
def test_random_json_gives_a_storage_error(directory: RunDirectory, content: object) -> None:
    """JSON of any other form, object or not, is a StorageError."""
    directory.write(PATH, json.dumps(content).encode())
    with pytest.raises(StorageError, match=r"manifest.json is damaged"):
        checkpoint.read_manifest(directory, 7)


@pytest.mark.parametrize("key", ["format", "version", "heads", "files", "facts"])
def test_a_manifest_that_lacks_a_part_is_damaged(directory: RunDirectory, intact: dict[str, Any], key: str) -> None:
    """Each part is required."""
    directory.write(PATH, json.dumps({k: v for k, v in intact.items() if k != key}).encode())
    with pytest.raises(StorageError, match=f"manifest.json is damaged: KeyError: '{key}'"):
        checkpoint.read_manifest(directory, 7)


def test_a_format_of_another_release_is_refused(directory: RunDirectory, intact: dict[str, Any]) -> None:
    """The error says so."""
    directory.write(PATH, json.dumps(intact | {"format": checkpoint.FORMAT + 1}).encode())
    with pytest.raises(StorageError, match="a format that this release of lte-ray can't read"):
        checkpoint.read_manifest(directory, 7)


@given(st.sampled_from(["version", "heads", "files"]), values)
def test_a_part_of_a_wrong_type_gives_no_other_error(
    directory: RunDirectory, intact: dict[str, Any], key: str, value: object
) -> None:
    """With any value in one part, reading succeeds or is a StorageError."""
    read(directory, json.dumps(intact | {key: value}).encode())


@given(st.sampled_from(["name", "size", "sha256"]), values)
def test_a_file_entry_of_a_wrong_type_gives_no_other_error(
    directory: RunDirectory, intact: dict[str, Any], key: str, value: object
) -> None:
    """The same for each part of a file's entry."""
    first, *rest = intact["files"]
    read(directory, json.dumps(intact | {"files": [first | {key: value}, *rest]}).encode())


@given(st.data())
def test_an_edited_manifest_is_detected(directory: RunDirectory, intact: dict[str, Any], data: st.DataObject) -> None:
    """With any other value in any part, the error says that it was torn or edited, or what is wrong with the part."""
    key = data.draw(st.sampled_from(sorted(set(intact) - {"format"})))
    value = data.draw(values.filter(lambda v: json.dumps(v) != json.dumps(intact[key])))
    directory.write(PATH, json.dumps(intact | {key: value}).encode())
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        checkpoint.read_manifest(directory, 7)


def test_an_edited_fact_is_detected(directory: RunDirectory, intact: dict[str, Any]) -> None:
    """Nothing else is wrong: with a new checksum the manifest is accepted."""
    edited = intact | {"facts": {"step": 4}}
    directory.write(PATH, json.dumps(edited).encode())
    with pytest.raises(
        StorageError, match="damaged: ValueError: its content isn't what its checksum says; it was torn or edited"
    ):
        checkpoint.read_manifest(directory, 7)
    directory.write(PATH, checkpoint.serialize_manifest(edited))
    assert checkpoint.read_manifest(directory, 7).facts == {"step": 4}


facts = st.dictionaries(st.text(max_size=5) | st.integers(), values, max_size=4)


@given(facts)
def test_any_facts_are_read_back(directory: RunDirectory, facts: dict[Any, Any]) -> None:
    """As JSON: heads' numbers become text, and `commit` returns what reading returns."""
    manifest = checkpoint.commit(directory, 8, (), [], facts)
    assert repr(checkpoint.read_manifest(directory, 8)) == repr(manifest)  # NaN is unequal to itself, but has one text
    assert repr(manifest.facts) == repr(json.loads(json.dumps(facts)))


@pytest.mark.parametrize(
    "name", ["../base.safetensors", "/etc/passwd", "a/b.safetensors", "manifest.json", "", "a.0.safetensors"]
)
def test_files_elsewhere_cannot_be_listed(directory: RunDirectory, intact: dict[str, Any], name: str) -> None:
    """Only plain names of safetensors files are accepted, also with a right checksum."""
    first, *rest = intact["files"]
    directory.write(PATH, checkpoint.serialize_manifest(intact | {"files": [first | {"name": name}, *rest]}))
    with pytest.raises(StorageError, match=r"manifest\.json is damaged: ValueError: it lists"):
        checkpoint.read_manifest(directory, 7)


def test_nothing_can_be_listed_twice(directory: RunDirectory, intact: dict[str, Any]) -> None:
    """Neither a file, with any number in its name, nor a head."""
    first = intact["files"][0]
    stem = first["name"].removesuffix(".safetensors")
    twice = {"files": [*intact["files"], first | {"name": f"{stem}.1.safetensors"}]}
    for change in (twice, {"heads": [0, 0]}, {"heads": [-1]}):
        directory.write(PATH, checkpoint.serialize_manifest(intact | change))
        with pytest.raises(StorageError, match="damaged: ValueError: it lists a file or a head twice, or a head that can't"):
            checkpoint.read_manifest(directory, 7)
