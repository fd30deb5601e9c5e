"""Checkpoints: whole or nothing, bitwise, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_plan_of, random_flat
from hypothesis import given
from hypothesis import strategies as st

from lte_ray import checkpoint
from lte_ray.checkpoint import Manifest
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory

PLAN = make_plan_of([(6, 5, 2)], [(4,), ()])
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
    return RunDirectory.of(str(tmp_path), "run")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with one checkpoint, for properties that put back what they change."""
    directory = RunDirectory.of(str(tmp_path_factory.mktemp("shared")), "run")
    write(directory)
    return directory


def test_what_is_written_is_read_back_bitwise(directory: RunDirectory) -> None:
    """Base, heads' tensors of all types, their numbers and the facts are the same."""
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
    """A checkpoint's folder holds the documented files, and base.safetensors opens with any safetensors reader."""
    import safetensors.torch

    write(directory)
    assert directory.names("checkpoints") == ["000007"]
    names = ["base.safetensors", "head-0000.safetensors", "head-0001.safetensors", "manifest.json"]
    assert directory.names("checkpoints/000007") == names
    stored = safetensors.torch.load(directory.read("checkpoints/000007/base.safetensors"))
    assert {n: tuple(t.shape) for n, t in stored.items()} == {"w0": (6, 5), "p0": (4,), "p1": ()}


def test_a_float64_base_keeps_its_type(directory: RunDirectory) -> None:
    """The base is read in the type that it was written in."""
    base = random_flat(PLAN.base.size, 2)
    manifest = checkpoint.commit(directory, 1, (), [checkpoint.write_base(directory, 1, PLAN, base)], {})
    assert torch.equal(checkpoint.read_base(directory, manifest, PLAN), base)


def test_without_a_manifest_a_checkpoint_is_not_complete(directory: RunDirectory) -> None:
    """It isn't listed and is removed by remove_incomplete, which leaves complete ones alone."""
    write(directory, 7)
    checkpoint.write_base(directory, 9, PLAN, BASE)
    assert checkpoint.complete(directory) == [7]
    with pytest.raises(StorageError, match=r"000009/manifest.json can't be read"):
        checkpoint.read_manifest(directory, 9)
    checkpoint.remove_incomplete(directory)
    assert directory.names("checkpoints") == ["000007"]
    assert torch.equal(checkpoint.read_base(directory, checkpoint.read_manifest(directory, 7), PLAN), BASE)


def test_a_run_without_checkpoints_has_none(directory: RunDirectory) -> None:
    """Nothing to list, to remove or to prune is no error."""
    checkpoint.remove_incomplete(directory)
    checkpoint.prune(directory, 1)
    assert checkpoint.complete(directory) == []


def test_commit_refuses_a_file_that_it_does_not_see(directory: RunDirectory) -> None:
    """As when another node wrote to its own disk: there is no manifest then, and the error says what storage must be."""
    file = checkpoint.write_base(directory, 7, PLAN, BASE)
    directory.delete("checkpoints/000007/base.safetensors")
    with pytest.raises(StorageError, match=r"written on another node .* --storage must be a place that all of them share"):
        checkpoint.commit(directory, 7, (), [file], {})
    assert checkpoint.complete(directory) == []


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [2, 10, 999999, 1000000]), (1, [1000000]), (3, [10, 999999, 1000000]), (9, None)]
)
def test_prune_keeps_the_newest(directory: RunDirectory, keep: int | None, left: list[int] | None) -> None:
    """By version, not by name; None keeps all, and incomplete ones aren't counted."""
    versions = [2, 10, 999999, 1000000]
    for version in versions:
        checkpoint.commit(directory, version, (), [], {})
    checkpoint.write_base(directory, 2000000, PLAN, BASE)
    checkpoint.prune(directory, keep)
    assert checkpoint.complete(directory) == (left or versions)
    assert directory.exists("checkpoints/2000000")


@given(st.sampled_from(["base.safetensors", "head-0001.safetensors"]), st.integers(0), st.integers(1, 255))
def test_one_altered_byte_is_named_as_damage(shared: RunDirectory, name: str, at: int, change: int) -> None:
    """Whichever byte of a file is another, reading it is a StorageError that names the file."""
    path = f"checkpoints/000007/{name}"
    intact = shared.read(path)
    damaged = bytearray(intact)
    damaged[at % len(intact)] ^= change
    read_damaged(shared, path, bytes(damaged), intact)


@given(st.sampled_from(["base.safetensors", "head-0001.safetensors"]), st.integers(0))
def test_a_truncated_file_is_named_as_damage(shared: RunDirectory, name: str, length: int) -> None:
    """Wherever it ends, down to an empty file."""
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
        checkpoint.read_base(shared, manifest, make_plan_of(shapes, replicas))


def test_a_head_that_the_checkpoint_does_not_hold_is_a_storage_error(shared: RunDirectory) -> None:
    """Reading it names the file that isn't there."""
    with pytest.raises(StorageError, match=r"head-0005.safetensors can't be read"):
        checkpoint.read_head(shared, checkpoint.read_manifest(shared, 7), 5)
