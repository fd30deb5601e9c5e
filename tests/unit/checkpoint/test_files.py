"""Checkpoints are complete or absent, are restored bit for bit, and errors name damaged files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray import checkpoint
from lte_ray.checkpoint import FileEntry, Manifest
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory
from tests.support.plans import plan_from_shapes, random_flat

PLAN = plan_from_shapes([(6, 5, 2)], [(4,), ()])
BASE = random_flat(PLAN.base.size, 1, torch.float32)
TENSORS = {
    "factor.w0.lora_A": torch.randn(2, 5, dtype=torch.float64),
    "replica.p1": torch.tensor(0.5),
    "rng.torch": torch.get_rng_state(),
    "transposed": torch.arange(6).view(2, 3).T,
}
META = {"head": 1, "loss": 0.1 + 0.2, "rng": {"python": [3, [1, 2, 2**32 - 1], None]}, "text": "ü"}
FACTS = {"step": 30, "num_heads": 2, "lora_r": 2}


def write(directory: RunDirectory, version: int = 7) -> Manifest:
    files = [checkpoint.write_head(directory, version, head, TENSORS, META | {"head": head}) for head in (1, 0)]
    files.append(checkpoint.write_base(directory, version, PLAN, BASE))
    return checkpoint.commit(directory, version, (1, 0), files, FACTS)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path), "run")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with one checkpoint, for properties that restore what they change."""
    directory = RunDirectory.open(str(tmp_path_factory.mktemp("shared")), "run")
    write(directory)
    return directory


def test_what_is_written_is_read_back_bitwise(directory: RunDirectory) -> None:
    """The base, heads' tensors of all types, their numbers and the facts are the same."""
    written = write(directory)
    manifest = checkpoint.read_manifest(directory, 7)
    assert manifest == written
    assert (manifest.version, manifest.heads, manifest.facts) == (7, (0, 1), FACTS)
    base = checkpoint.read_base(directory, manifest, PLAN)
    assert base.dtype == torch.float32
    assert torch.equal(base, BASE)
    for head in (0, 1):
        tensors, meta = checkpoint.read_head(directory, manifest, head)
        assert meta == META | {"head": head}
        assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {n: (t.dtype, t.shape) for n, t in TENSORS.items()}
        assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


def test_the_base_is_stored_under_the_models_own_names(directory: RunDirectory) -> None:
    """The folder holds the documented files, and any safetensors reader opens base.safetensors."""
    import safetensors.torch

    write(directory)
    assert directory.list_names("checkpoints") == ["000007"]
    names = ["base.safetensors", "head-0000.safetensors", "head-0001.safetensors", "manifest.json"]
    assert directory.list_names("checkpoints/000007") == names
    stored = safetensors.torch.load(directory.read("checkpoints/000007/base.safetensors"))
    assert {n: tuple(t.shape) for n, t in stored.items()} == {"w0": (6, 5), "p0": (4,), "p1": ()}


def test_a_float64_base_keeps_its_type(directory: RunDirectory) -> None:
    """The base is read in the type in which it was written."""
    base = random_flat(PLAN.base.size, 2)
    manifest = checkpoint.commit(directory, 1, (), [checkpoint.write_base(directory, 1, PLAN, base)], {})
    assert torch.equal(checkpoint.read_base(directory, manifest, PLAN), base)


def test_without_a_manifest_a_checkpoint_is_not_complete(directory: RunDirectory) -> None:
    """It isn't listed, and `remove_incomplete` removes it but keeps complete ones."""
    write(directory, 7)
    checkpoint.write_base(directory, 9, PLAN, BASE)
    assert checkpoint.complete_versions(directory) == [7]
    with pytest.raises(StorageError, match=r"000009/manifest.json can't be read"):
        checkpoint.read_manifest(directory, 9)
    checkpoint.remove_incomplete(directory)
    assert directory.list_names("checkpoints") == ["000007"]
    assert torch.equal(checkpoint.read_base(directory, checkpoint.read_manifest(directory, 7), PLAN), BASE)


def test_a_run_without_checkpoints_has_none(directory: RunDirectory) -> None:
    """Listing, removing and pruning nothing is no error."""
    checkpoint.remove_incomplete(directory)
    checkpoint.prune(directory, 1)
    assert checkpoint.complete_versions(directory) == []


def test_commit_refuses_a_file_that_it_does_not_see(directory: RunDirectory) -> None:
    """As when another node wrote to its own disk: no manifest is written, and the error says what storage is needed."""
    file = checkpoint.write_base(directory, 7, PLAN, BASE)
    directory.delete("checkpoints/000007/base.safetensors")
    with pytest.raises(StorageError, match=r"written on another node .* --storage must be a place that all of them share"):
        checkpoint.commit(directory, 7, (), [file], {})
    assert checkpoint.complete_versions(directory) == []


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [2, 10, 999999, 1000000]), (1, [1000000]), (3, [10, 999999, 1000000]), (9, None)]
)
def test_prune_keeps_the_newest(directory: RunDirectory, keep: int | None, left: list[int] | None) -> None:
    """By version, not by name. None keeps all; incomplete checkpoints don't count."""
    versions = [2, 10, 999999, 1000000]
    for version in versions:
        checkpoint.commit(directory, version, (), [], {})
    checkpoint.write_base(directory, 2000000, PLAN, BASE)
    checkpoint.prune(directory, keep)
    assert checkpoint.complete_versions(directory) == (left or versions)
    assert directory.exists("checkpoints/2000000")


@pytest.mark.parametrize(("rollback_version", "left"), [(3, [3, 5]), (4, [3, 5]), (5, [5]), (0, [5]), (None, [5])])
def test_prune_keeps_the_rollback_version(directory: RunDirectory, rollback_version: int | None, left: list[int]) -> None:
    """The newest checkpoint up to the rollback version, however many were written since."""
    for version in (1, 3, 5):
        checkpoint.commit(directory, version, (), [], {})
    checkpoint.prune(directory, 1, rollback_version=rollback_version)
    assert checkpoint.complete_versions(directory) == left


@given(st.sampled_from(["base.safetensors", "head-0001.safetensors"]), st.integers(0), st.integers(1, 255))
def test_one_changed_byte_is_damage(shared: RunDirectory, name: str, at: int, change: int) -> None:
    """If any byte of a file differs, reading it is a StorageError that names the file."""
    path = f"checkpoints/000007/{name}"
    intact = shared.read(path)
    damaged = bytearray(intact)
    damaged[at % len(intact)] ^= change
    read_damaged(shared, path, bytes(damaged), intact)


@given(st.sampled_from(["base.safetensors", "head-0001.safetensors"]), st.integers(0))
def test_a_truncated_file_is_damage(shared: RunDirectory, name: str, length: int) -> None:
    """At any length, down to an empty file."""
    path = f"checkpoints/000007/{name}"
    intact = shared.read(path)
    read_damaged(shared, path, intact[: length % len(intact)], intact)


def read_damaged(shared: RunDirectory, path: str, data: bytes, intact: bytes) -> None:
    manifest = checkpoint.read_manifest(shared, 7)
    shared.write(path, data)
    try:
        with pytest.raises(StorageError, match=f"{path} is damaged"):
            read_all(shared, manifest)
    finally:
        shared.write(path, intact)


def read_all(directory: RunDirectory, manifest: Manifest) -> None:
    checkpoint.read_base(directory, manifest, PLAN)
    for head in manifest.heads:
        checkpoint.read_head(directory, manifest, head)


@pytest.mark.parametrize(
    ("shapes", "replicas", "differing"),
    [([(6, 5, 2)], [(5,), ()], "p0"), ([(5, 6, 2)], [(4,), ()], "w0"), ([(6, 5, 2)], [(4,)], "p1")],
)
def test_another_models_base_is_refused(
    shared: RunDirectory, shapes: list[tuple[int, int, int]], replicas: list[tuple[int, ...]], differing: str
) -> None:
    """The error names the parameters in which the models differ."""
    manifest = checkpoint.read_manifest(shared, 7)
    with pytest.raises(StorageError, match=rf"holds another model than the worker builds; they differ in .*'{differing}'"):
        checkpoint.read_base(shared, manifest, plan_from_shapes(shapes, replicas))


def test_a_head_that_the_checkpoint_does_not_hold_is_a_storage_error(shared: RunDirectory) -> None:
    """The error names the missing file."""
    with pytest.raises(StorageError, match=r"head-0005.safetensors can't be read"):
        checkpoint.read_head(shared, checkpoint.read_manifest(shared, 7), 5)


def test_references_are_read_back_bitwise(directory: RunDirectory) -> None:
    """By head, also with long numbers; a missing head has none."""
    references = {head: torch.randn(PLAN.factors_size) for head in (0, 3, 12345)}
    files = [checkpoint.write_references(directory, 7, references)]
    manifest = checkpoint.commit(directory, 7, (), files, {})
    assert files[0].name == "references.safetensors"
    found = checkpoint.read_references(directory, manifest, [PLAN] * 4)
    assert {head: t.tolist() for head, t in found.items()} == {head: t.tolist() for head, t in references.items()}


def test_without_references_there_are_none(directory: RunDirectory) -> None:
    """As at the start, where B' = 0, and with an empty file."""
    assert checkpoint.read_references(directory, checkpoint.commit(directory, 1, (), [], {})) == {}
    files = [checkpoint.write_references(directory, 2, {})]
    assert checkpoint.read_references(directory, checkpoint.commit(directory, 2, (), files, {})) == {}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("head-1", torch.ones(4)),
        ("head-00x1", torch.ones(4)),
        ("base", torch.ones(4)),
        ("head-\u0661\u0661\u0661\u0661", torch.ones(4)),
        ("head-0001", torch.ones(2, 2)),
        ("head-0001", torch.ones(4, dtype=torch.int64)),
    ],
)
def test_invalid_references_are_damage(directory: RunDirectory, name: str, tensor: torch.Tensor) -> None:
    """Names, shapes and types that `write_references` doesn't write, with right checksums."""
    file = forge(directory, "references.safetensors", safetensors.torch.save({name: tensor}))
    with pytest.raises(StorageError, match=r"references.safetensors is damaged: "):
        checkpoint.read_references(directory, checkpoint.commit(directory, 7, (), [file], {}))


def test_references_of_other_ranks_are_refused(directory: RunDirectory) -> None:
    """The number of factors must be the plan's. `check_factors` uses it if there are no heads' states."""
    files = [checkpoint.write_references(directory, 7, {0: torch.zeros(PLAN.factors_size + 1)})]
    manifest = checkpoint.commit(directory, 7, (), files, {})
    for read in (checkpoint.read_references, checkpoint.check_factors):
        with pytest.raises(StorageError, match="holds heads with other factors; they differ in the size of head 0's"):
            read(directory, manifest, [PLAN])
    checkpoint.check_factors(directory, manifest, [])


def forge(directory: RunDirectory, name: str, data: bytes) -> FileEntry:
    """Writes a file of any content, and returns its entry with a right checksum."""
    directory.write(f"checkpoints/000007/{name}", data)
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def header(value: object, body: bytes = b"") -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + body


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
STATE = {"state": "{}"}
HOSTILE = {
    "nothing": b"",
    "a length alone": (5).to_bytes(8, "little"),
    "a length beyond the file": (2**62).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"abcd",
    "a list": header([]),
    "no metadata": header({"a": ONE}, b"1234"),
    "no state": header({"__metadata__": {"other": "{}"}, "a": ONE}, b"1234"),
    "a state of another type": header({"__metadata__": {"state": 5}, "a": ONE}, b"1234"),
    "a state that is no JSON": header({"__metadata__": {"state": "{"}, "a": ONE}, b"1234"),
    "a state that is a list": header({"__metadata__": {"state": "[]"}, "a": ONE}, b"1234"),
    "a deep state": header({"__metadata__": {"state": "[" * 99_999}, "a": ONE}, b"1234"),
    "fewer bytes than tensors": header({"__metadata__": STATE, "a": ONE}, b"12"),
    "more bytes than tensors": header({"__metadata__": STATE, "a": ONE}, b"123456"),
    "an unknown type": header({"__metadata__": STATE, "a": ONE | {"dtype": "PICKLE"}}, b"1234"),
    "a shape that overflows": header({"__metadata__": STATE, "a": ONE | {"shape": [2**40, 2**40]}}, b"1234"),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_hostile_head_files_are_damage(directory: RunDirectory, case: str) -> None:
    """With right checksums: one error that names the file, and no other."""
    manifest = checkpoint.commit(directory, 7, (1,), [forge(directory, "head-0001.safetensors", HOSTILE[case])], {})
    checkpoint.verify(directory, manifest)
    with pytest.raises(StorageError, match=r"000007/head-0001.safetensors is damaged: .{,220}\.$"):
        checkpoint.read_head(directory, manifest, 1)


@given(st.integers(0), st.binary(min_size=1, max_size=3))
def test_any_head_file_with_a_right_checksum_is_read_or_damage(shared: RunDirectory, at: int, new: bytes) -> None:
    """With any bytes at any position."""
    intact = shared.read("checkpoints/000007/head-0001.safetensors")
    at %= len(intact)
    other = RunDirectory.open("memory://fuzzed", "run")
    data = intact[:at] + new + intact[at + len(new) :]
    other.delete("checkpoints/000007/manifest.json")
    manifest = checkpoint.commit(other, 7, (1,), [forge(other, "head-0001.safetensors", data)], {})
    try:
        tensors, state = checkpoint.read_head(other, manifest, 1)
    except StorageError as error:
        assert "head-0001.safetensors is damaged" in str(error)  # noqa: PT017
    else:
        assert isinstance(state, dict)
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int64, torch.int64), (torch.float32, torch.float64, torch.float32)])
def test_a_base_of_mixed_or_whole_numbers_is_damage(directory: RunDirectory, dtypes: tuple[torch.dtype, ...]) -> None:
    """Otherwise it would be merged in a type that the user did not choose."""
    tensors = {e.name: torch.ones(e.shape, dtype=kind) for e, kind in zip(PLAN.base.entries, dtypes, strict=True)}
    file = forge(directory, "base.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(StorageError, match=r"base.safetensors is damaged: its weights are of torch\."):
        checkpoint.read_base(directory, checkpoint.commit(directory, 7, (), [file], {}), PLAN)


def test_a_file_is_not_read_beyond_what_the_manifest_lists(directory: RunDirectory) -> None:
    """A file that has grown is damaged; its size is enough to tell."""
    manifest = write(directory)
    name = "checkpoints/000007/base.safetensors"
    with open(directory.path_to(name), "ab") as file:
        file.truncate(2**40)  # needs no space on the disk, but a terabyte of memory to read
    with pytest.raises(StorageError, match=rf"{name} is damaged: .*it has {2**40} bytes where at most"):
        checkpoint.verify(directory, manifest)


def test_commit_refuses_a_file_of_another_size(directory: RunDirectory) -> None:
    """As when the coordinator sees a stale or torn copy."""
    file = checkpoint.write_base(directory, 7, PLAN, BASE)
    directory.write("checkpoints/000007/base.safetensors", b"torn")
    with pytest.raises(StorageError, match=f"but has 4 bytes instead of {file.size} by the coordinator"):
        checkpoint.commit(directory, 7, (), [file], {})


def test_a_checkpoint_in_memory_works_like_one_on_disk() -> None:
    """On a filesystem of fsspec."""
    directory = RunDirectory.open("memory://checkpoints", "run")
    manifest = write(directory)
    assert checkpoint.read_newest_intact(directory) == (manifest, [])
    assert torch.equal(checkpoint.read_base(directory, manifest, PLAN), BASE)
    again = write(directory)
    assert checkpoint.read_newest_intact(directory) == (again, [])
    checkpoint.remove_after(directory, 0)
    assert checkpoint.complete_versions(directory) == []


def test_a_policys_state_is_read_under_the_name_that_an_earlier_release_gave_its_class(tmp_path: Path) -> None:
    """Another policy's state isn't."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    entry = checkpoint.write_policy(directory, 1, "lte_ray.merging.nesterov:Nesterov", {"momentum": torch.ones(2)})
    checkpoint.commit(directory, 1, [], [entry], {})
    manifest = checkpoint.read_manifest(directory, 1)
    assert checkpoint.read_policy(directory, manifest, "lte_ray.merging:Nesterov").keys() == {"momentum"}
    assert checkpoint.read_policy(directory, manifest, "lte_ray.merging:Momentum") == {}
