"""Which checkpoint a run resumes from and which are kept, if newer ones are damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray import checkpoint
from lte_ray.checkpoint import Manifest
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory
from tests.support.faulty_storage import fail, faulty
from tests.support.plans import plan_from_shapes, random_flat

PLAN = plan_from_shapes([(6, 5, 2)], [(4,)])
BASE = random_flat(PLAN.base.size, 1, torch.float32)


def write(directory: RunDirectory, version: int, base: torch.Tensor = BASE) -> Manifest:
    files = [checkpoint.write_base(directory, version, PLAN, base)]
    files.append(checkpoint.write_references(directory, version, {1: torch.full((PLAN.factors_size,), float(version))}))
    files.append(checkpoint.write_head(directory, version, 1, {"a": torch.ones(3)}, {"step": version}))
    return checkpoint.commit(directory, version, (1,), files, {"step": version})


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path), "run")


def place(directory: RunDirectory, version: int, name: str) -> Path:
    return Path(directory.path, "checkpoints", f"{version:06d}", name)


def test_the_newest_is_used_if_it_is_intact(directory: RunDirectory) -> None:
    """Without a warning. In format 2 it needs no head's state."""
    for version in (10, 20):
        write(directory, version)
    newest = checkpoint.commit(directory, 30, (), [checkpoint.write_base(directory, 30, PLAN, BASE)], {})
    assert checkpoint.read_newest_intact(directory) == (newest, [])
    assert checkpoint.has_all_heads(newest)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a changed byte": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir())[0],
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path))[0],
    "a link to nothing": lambda path: linked(path, "nothing"),
    "a link to itself": lambda path: linked(path, path.name),
    "a link to a name too long": lambda path: linked(path, 300 * "x"),
}


def linked(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


FILES = ["base.safetensors", "head-0001.safetensors", "references.safetensors", "manifest.json"]
NONE = {"gone", "a link to nothing", "a link to itself", "a link to a name too long"}
"""Damage that makes a manifest count as missing, so that no checkpoint is named."""
CASES = [(name, how) for name in FILES for how in DAMAGE if name != "manifest.json" or how not in NONE]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(directory: RunDirectory, name: str, how: str) -> None:
    """One line for each checkpoint that was skipped, with the file and the checkpoint that is used instead."""
    for version in (20, 40, 60):
        write(directory, version)
    for version in (40, 60):
        DAMAGE[how](place(directory, version, name))
    manifest, passed = checkpoint.read_newest_intact(directory)
    assert manifest == checkpoint.read_manifest(directory, 20)
    assert len(passed) == 2
    for line, version in zip(passed, (60, 40), strict=True):
        assert line.startswith(f"checkpoints/{version:06d}/{name} ")
        assert ("is damaged: " in line) or ("can't be read: " in line)
        assert line.endswith("; using 000020 instead")
        assert line.isprintable()


def test_without_an_intact_checkpoint_the_error_names_all(directory: RunDirectory) -> None:
    """It names every damaged file."""
    for version in (20, 40):
        write(directory, version)
        flip(place(directory, version, "base.safetensors"))
    with pytest.raises(
        StorageError, match=r"None of the checkpoints in .*/run can be used: checkpoints/000040/base.* 000020/|000020/base"
    ) as caught:
        checkpoint.read_newest_intact(directory)
    assert all(f"checkpoints/{version}/base.safetensors is damaged" in str(caught.value) for version in ("000040", "000020"))


def test_without_a_checkpoint_the_error_says_so(directory: RunDirectory) -> None:
    """It also says if one was begun."""
    with pytest.raises(StorageError, match=r"There is no complete checkpoint in .*/run\.$"):
        checkpoint.read_newest_intact(directory)
    checkpoint.write_base(directory, 9, PLAN, BASE)
    with pytest.raises(StorageError, match=r"There is no complete checkpoint in .*/run \(1 was begun but not completed\)\.$"):
        checkpoint.read_newest_intact(directory)


@pytest.mark.parametrize("name", ["manifest.json", "base.safetensors"])
def test_storage_that_fails_is_not_damage(tmp_path: Path, name: str) -> None:
    """Otherwise a run would resume from an older checkpoint while the network is down."""
    directory, script = faulty(tmp_path, patience=0)
    for version in (20, 40):
        write(directory, version)
    script.write(fail(op="read", errno="ECONNRESET", match=f"*/000040/{name}"))
    with pytest.raises(StorageError, match="Connection reset by peer") as caught:
        checkpoint.read_newest_intact(directory)
    assert not isinstance(caught.value, checkpoint.Damaged)


def test_a_version_that_is_written_again_replaces_no_file_in_place(directory: RunDirectory) -> None:
    """The old checkpoint is intact until the new manifest is written; then the old files are removed."""
    old = write(directory, 7)
    again = BASE + 1
    files = [checkpoint.write_base(directory, 7, PLAN, again)]
    assert files[0].name == "base.1.safetensors"
    checkpoint.verify(directory, old)
    assert torch.equal(checkpoint.read_base(directory, checkpoint.read_manifest(directory, 7), PLAN), BASE)
    files.append(checkpoint.write_policy(directory, 7, "p", {"momentum": again}))
    checkpoint.write_evaluation(directory, 7, {"loss": 1.0})
    new = checkpoint.commit(directory, 7, (), files, {"step": 8})
    assert checkpoint.read_newest_intact(directory) == (new, [])
    assert torch.equal(checkpoint.read_base(directory, new, PLAN), again)
    assert torch.equal(checkpoint.read_policy(directory, new, "p")["momentum"], again)
    assert (checkpoint.read_references(directory, new), new.heads) == ({}, ())
    names = ["base.1.safetensors", "evaluation.json", "manifest.json", "policy.safetensors"]
    assert directory.list_names("checkpoints/000007") == names
    third = write(directory, 7)
    assert {file.name for file in third.files} == {"base.safetensors", "references.safetensors", "head-0001.safetensors"}
    checkpoint.verify(directory, third)


def test_a_late_writer_harms_no_complete_checkpoint(directory: RunDirectory) -> None:
    """A process that was thought dead writes its part of a version that was completed without it."""
    manifest = write(directory, 7)
    checkpoint.write_head(directory, 7, 1, {"a": torch.zeros(3)}, {"step": 0})
    checkpoint.verify(directory, manifest)
    assert checkpoint.read_head(directory, manifest, 1)[1] == {"step": 7}


figures = st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.sampled_from([0.5, 1.0, 2.0, math.nan, math.inf]))


@given(
    st.lists(st.none() | figures, min_size=1, max_size=7),
    st.integers(1, 3),
    st.integers(0, 4),
    st.sampled_from(["loss", "-loss", "accuracy", "-accuracy"]),
)
def test_prune_keeps_the_newest_and_the_best(
    tmp_path_factory: pytest.TempPathFactory, given: list[dict[str, float] | None], keep: int, keep_best: int, by: str
) -> None:
    """The best are the first of all versions, sorted by the figure, and by age for equal figures."""
    root = tmp_path_factory.mktemp("prune")
    directory = RunDirectory.open(str(root), "run")
    for version, values in enumerate(given):
        checkpoint.commit(directory, version, (), [], {})
        if values is not None:
            checkpoint.write_evaluation(directory, version, values)
    name, sign = by.lstrip("-"), -1 if by.startswith("-") else 1
    scored = [(sign * v[name], -i) for i, v in enumerate(given) if v and math.isfinite(v.get(name, math.nan))]
    expected = {-i for _, i in sorted(scored)[:keep_best]} | set(range(len(given))[-keep:])
    checkpoint.prune(directory, keep, keep_best, by)
    assert checkpoint.complete_versions(directory) == sorted(expected)
    shutil.rmtree(root)


def test_without_a_name_the_first_figure_counts(directory: RunDirectory) -> None:
    """The first one of the newest evaluation; lowest is best, or highest with a dash alone."""
    for version, loss in enumerate([1.0, 5.0, 3.0, 4.0]):
        checkpoint.commit(directory, version, (), [], {})
        checkpoint.write_evaluation(directory, version, {"loss": loss, "accuracy": -loss} if version else {"accuracy": loss})
    checkpoint.prune(directory, 1, 1, "-")
    assert checkpoint.complete_versions(directory) == [1, 3]
    checkpoint.commit(directory, 4, (), [], {})
    checkpoint.prune(directory, 1, 1)
    assert checkpoint.complete_versions(directory) == [3, 4]


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b'{"version": 1}', b'{"version": 2, "values": {}}', b'{"version": 1, "values": 3}', b"[" * 9999],
)
def test_an_invalid_evaluation_does_not_count(directory: RunDirectory, data: bytes) -> None:
    """Reading it is an error; pruning continues without it."""
    for version in (1, 2, 3):
        checkpoint.commit(directory, version, (), [], {})
        checkpoint.write_evaluation(directory, version, {"loss": float(version)})
    assert checkpoint.read_evaluation(directory, 2) == {"loss": 2.0}
    place(directory, 1, "evaluation.json").write_bytes(data)
    with pytest.raises(StorageError, match=r"000001/evaluation\.json is damaged"):
        checkpoint.read_evaluation(directory, 1)
    checkpoint.prune(directory, 1, 1)
    assert checkpoint.complete_versions(directory) == [2, 3]


def test_an_evaluation_holds_plain_json(directory: RunDirectory) -> None:
    """Figures that aren't finite are null and aren't read; text isn't a figure."""
    checkpoint.write_evaluation(directory, 5, {"b": 1, "a": math.nan, "c": -math.inf})
    path = place(directory, 5, "evaluation.json")
    content = json.loads(path.read_text())
    assert content == {"version": 5, "values": {"b": 1.0, "a": None, "c": None}}
    path.write_text(json.dumps({"version": 5, "values": {"b": 1, "x": "2", "y": True, "z": [1], "big": 10**400}}))
    with pytest.raises(StorageError, match=r"damaged: OverflowError"):
        checkpoint.read_evaluation(directory, 5)
    path.write_text(json.dumps({"version": 5, "values": {"b": 1, "x": "2", "y": True, "z": [1]}}))
    assert checkpoint.read_evaluation(directory, 5) == {"b": 1.0}


def test_failing_storage_removes_no_best_checkpoint(tmp_path: Path) -> None:
    """An evaluation that can't be read now may be the best: nothing is removed, and nothing is raised."""
    directory, script = faulty(tmp_path, patience=0)
    for version in (1, 2, 3):
        checkpoint.commit(directory, version, (), [], {})
        checkpoint.write_evaluation(directory, version, {"loss": float(version)})
    script.write(fail(op="read", errno="EIO", match="*/000001/evaluation.json"))
    checkpoint.prune(directory, 1, 1)
    assert checkpoint.complete_versions(directory) == [1, 2, 3]
    script.write(fail(op="delete", errno="EIO"))
    checkpoint.prune(directory, 1, 1)
    assert checkpoint.complete_versions(directory) == [1, 2, 3]
    script.write()
    checkpoint.prune(directory, 1, 1)
    assert checkpoint.complete_versions(directory) == [1, 3]
