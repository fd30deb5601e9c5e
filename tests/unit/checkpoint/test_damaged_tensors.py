"""Forged tensor files that their manifest lists: one StorageError, for any content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte_ray.storage import RunDirectory
from tests.support.checkpoint_damage import FOLDER, copy_run, forge_file, read_and_check, write_checkpoint

FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one intact checkpoint of version 1, for copies."""
    root = tmp_path_factory.mktemp("intact")
    write_checkpoint(RunDirectory.open(str(root), "run"))
    return root / "run"


def header(value: Any, body: bytes = b"") -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + body


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TENSORS: dict[str, bytes] = {
    "empty": b"", "short": b"abc", "a length and nothing": (2**63).to_bytes(8, "little"), "a long header": b"\xff" * 8 + b"{}",
    "header beyond the file": (10**6).to_bytes(8, "little") + b"{}", "no JSON": (4).to_bytes(8, "little") + b"abcd",
    "a list": header([]), "null": header(None), "number": header(5), "deep": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "metadata as text": header({"__metadata__": "a"}), "metadata of numbers": header({"__metadata__": {"state": 5}}),
    "no state": header({"__metadata__": {}}), "state as text": header({"__metadata__": {"state": '"a"'}}),
    "state cut off": header({"__metadata__": {"state": "{"}}), "deep state": header({"__metadata__": {"state": "[" * 10**5}}),
    "NaN state": header({"__metadata__": {"state": "NaN"}}), "unknown type": header({"a": ONE | {"dtype": "OBJECT"}}, b"1234"),
    "offsets beyond": header({"a": ONE | {"data_offsets": [0, 10**9]}}, b"1234"),
    "negative": header({"a": ONE | {"shape": [-1]}}, b"1234"),
    "overlapping": header({"a": ONE, "b": ONE}, b"1234"), "huge shape": header({"a": ONE | {"shape": [2**62, 4]}}, b"1234"),
    "other tensors": safetensors.torch.save({"a": torch.ones(1)}), "no tensors": safetensors.torch.save({}),
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.", "torch.save": b"PK\x03\x04" + b"\0" * 60,
}  # fmt: skip


@pytest.mark.parametrize("name", [f"{name}.safetensors" for name in ("base", "head-0000", "references", "policy")])
@pytest.mark.parametrize("case", list(TENSORS))
def test_a_forged_file_is_one_error(intact: Path, tmp_path: Path, name: str, case: str) -> None:
    """With a right checksum: it holds another model, or no tensors. Never another kind of error."""
    directory = copy_run(intact, tmp_path)
    forge_file(tmp_path, name, TENSORS[case])
    said = read_and_check(directory)
    assert len(said) > 1 or name[0] in "rp"  # references may be empty, and a policy may keep anything


@FUZZ
@given(data=st.data())
def test_a_forged_header_is_accepted_or_one_error(intact: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any byte of a head's header changed, with a right checksum."""
    directory = copy_run(intact, tmp_path)
    content = bytearray((intact / FOLDER / "head-0000.safetensors").read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    for at in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    forge_file(tmp_path, "head-0000.safetensors", bytes(content))
    read_and_check(directory)
