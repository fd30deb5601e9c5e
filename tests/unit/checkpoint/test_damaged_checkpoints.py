"""Damaged and forged checkpoints: always one StorageError; nothing is executed, and no file outside is touched."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte_ray import checkpoint
from lte_ray.config import LTEConfig, MergeConfig, StorageConfig, TrainConfig
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.run import start as run_start
from lte_ray.storage import RunDirectory
from tests.support.checkpoint_damage import FOLDER, copy_run, read_and_check, read_files, write_checkpoint

FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one intact checkpoint of version 1, for copies."""
    root = tmp_path_factory.mktemp("intact")
    write_checkpoint(RunDirectory.open(str(root), "run"))
    return root / "run"


def test_the_intact_checkpoint_is_read(intact: Path, tmp_path: Path) -> None:
    """The only error is about head 9, which it doesn't hold, so the errors below come from the damage."""
    assert len(read_and_check(copy_run(intact, tmp_path))) == 1


FILES = [
    "manifest.json",
    "base.safetensors",
    "momentum.safetensors",
    "head-0000.safetensors",
    "references.safetensors",
    "policy.safetensors",
]


@FUZZ
@given(name=st.sampled_from(FILES), data=st.data())
def test_any_changed_byte_is_detected(intact: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Bytes flipped, cut off, inserted or appended anywhere: an error about that file, unless its meaning is the same."""
    directory = copy_run(intact, tmp_path)
    file = tmp_path / "run" / FOLDER / name
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    more = data.draw(st.binary(max_size=4))
    cut = data.draw(st.integers(0, 4))
    changed = content[:at] + more + content[at + cut :]
    file.write_bytes(changed)
    said = read_and_check(directory)
    if changed != content and not (name == "manifest.json" and same_json(changed, content)):
        assert any(name in text and "damaged" in text for text in said)


def same_json(one: bytes, other: bytes) -> bool:
    """Whether two texts have the same JSON value, apart from white space."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, each in inner for p in places(each, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    made = dict(value) if isinstance(value, dict) else list(value)
    made[path[0]] = replaced(value[path[0]], path[1:], new)
    return made


names = st.sampled_from(["../../outside", "/etc/passwd", "a\0b", "..", "", "manifest.json", "x" * 300, "\ud800"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | names | st.just(10**400)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


@FUZZ
@given(data=st.data(), new=values)
def test_any_value_in_a_manifest_is_accepted_or_one_error(intact: Path, tmp_path: Path, data: st.DataObject, new: Any) -> None:
    """Any value replaced by any other."""
    directory = copy_run(intact, tmp_path)
    file = tmp_path / "run" / FOLDER / "manifest.json"
    manifest = json.loads(file.read_text())
    made = replaced(manifest, data.draw(st.sampled_from(places(manifest))), new)
    file.write_bytes(checkpoint.serialize_manifest(made) if isinstance(made, dict) else json.dumps(made).encode())
    read_and_check(directory)


MANIFESTS: dict[str, bytes] = {
    "empty": b"", "null": b"null", "a list": b"[]", "text": b'"a"', "number": b"1", "NaN": b"NaN", "binary": bytes(range(256)),
    "deep": b"[" * 100_000, "deep, closed": b"[" * 50_000 + b"]" * 50_000, "long number": b'{"format": ' + b"1" * 5_000 + b"}",
    "UTF-16": '{"format": 1}'.encode("utf-16"), "a future format": b'{"format": 99}', "format as text": b'{"format": "1"}',
    "twice": b'{"format": 1, "format": 2}', "true as format": b'{"format": true}', "pickle": b"cos\nsystem\n(S'true'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("case", list(MANIFESTS))
def test_an_invalid_manifest_is_one_error(intact: Path, tmp_path: Path, case: str) -> None:
    """The error names the file."""
    directory = copy_run(intact, tmp_path)
    (tmp_path / "run" / FOLDER / "manifest.json").write_bytes(MANIFESTS[case])
    with pytest.raises(StorageError, match=r"manifest\.json"):
        checkpoint.read_manifest(directory, 1)
    read_and_check(directory)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_one_error(intact: Path, tmp_path: Path, name: str) -> None:
    """The error names the file."""
    directory = copy_run(intact, tmp_path)
    file = tmp_path / "run" / FOLDER / name
    file.unlink()
    file.mkdir()
    assert any(name in text for text in read_and_check(directory))


@pytest.mark.parametrize("name", ["²", "٣", "1", "0000001", "-1", "+1", "1e3", " 1", "999999999999999999999", "000001 ", "x"])
def test_folders_that_are_not_versions_are_skipped(intact: Path, tmp_path: Path, name: str) -> None:
    """Numbers that this library doesn't write, in any digits."""
    directory = copy_run(intact, tmp_path)
    (tmp_path / "run" / "checkpoints" / name).mkdir()
    assert checkpoint.complete_versions(directory) == [1]
    checkpoint.remove_incomplete(directory)
    checkpoint.prune(directory, 1)
    read_and_check(directory)
    assert checkpoint.complete_versions(directory) == [1]


@pytest.mark.parametrize("act", ["prune", "remove_after", "remove_incomplete"])
def test_removing_checkpoints_never_follows_a_link(intact: Path, tmp_path: Path, act: str) -> None:
    """A checkpoint that is a link to another run's stays intact there."""
    other = tmp_path / "other"
    shutil.copytree(intact / FOLDER, other)
    if act == "remove_incomplete":
        (other / "manifest.json").rename(other / "kept.json")
    before = read_files(other)
    directory = copy_run(intact, tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    if act == "prune":
        write_checkpoint(directory, 2)
        (folder / "000000").symlink_to(other)
        checkpoint.prune(directory, 1)
    else:
        (folder / "000003").symlink_to(other)
        checkpoint.remove_after(directory, 1) if act == "remove_after" else checkpoint.remove_incomplete(directory)
    assert read_files(other) == before


@FUZZ
@given(data=st.data(), new=values)
def test_any_facts_are_accepted_or_one_error(intact: Path, tmp_path: Path, data: st.DataObject, new: Any) -> None:
    """The facts that a resumed run reads first: how far the run was, and which heads it had."""
    directory = copy_run(intact, tmp_path)
    file = tmp_path / "run" / FOLDER / "manifest.json"
    manifest = json.loads(file.read_text())
    place = data.draw(st.sampled_from([p for p in places(manifest) if p[:1] == ("facts",)]))
    file.write_bytes(checkpoint.serialize_manifest(replaced(manifest, place, new)))
    asked = Settings("run", LTEConfig(num_heads=2, lora_r=2), MergeConfig(), TrainConfig(steps=100))
    with contextlib.suppress(StorageError):
        run_start.check_start(directory, StorageConfig(name="run", resume=True), asked)
