"""Run names: an accepted name is one folder directly in the storage, and every other name is rejected."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte_ray.config import check_run_name
from lte_ray.errors import ConfigError
from lte_ray.storage import RunDirectory

BAD: dict[str, Any] = {
    "empty": "",
    "parent": "..",
    "here": ".",
    "hidden": ".a",
    "through": "a/../b",
    "absolute": "/a",
    "slash at the end": "a/",
    "NUL": "a\0b",
    "line end": "a\nb",
    "return": "a\rb",
    "tab": "a\tb",
    "escape": "a\x1b[2Jb",
    "delete": "a\x7fb",
    "C1": "a\x85b",
    "space before": " a",
    "space behind": "a ",
    "space only": " ",
    "dot behind": "a.",
    "backslash": "a\\b",
    "UNC": "\\\\host\\a",
    "flag": "--overwrite",
    "dash": "-",
    "too long": "a" * 256,
    "too many bytes": "ü" * 128,
    "fullwidth slash": "a\uff0fb",
    "fullwidth backslash": "a\uff3cb",
    "fullwidth dots": "\uff0e\uff0e",
    "one dot leaders": "\u2024\u2024",
    "two dot leader": "\u2025",
    "right to left": "a\u202etxt",
    "zero width": "a\u200bb",
    "BOM": "\ufeffa",
    "no-break space": "a\u00a0b",
    "line separator": "a\u2028b",
    "lone surrogate": "a\ud800b",
    "number": 5,
    "bytes": b"a",
    "list": ["a"],
    "account": "a\u2100b",
}


@pytest.mark.parametrize("case", list(BAD))
def test_names_that_could_lead_elsewhere_are_rejected(case: str) -> None:
    """The error is one printable line that says what is wrong; it shortens a long name."""
    with pytest.raises(ConfigError, match=r"--name is .*must be one plain folder name") as raised:
        check_run_name(BAD[case])
    said = str(raised.value)
    assert said.isprintable()
    assert len(said) < 250


@pytest.mark.parametrize(
    "name", ["a", "vit-2024", "second try", "ünïcode", "a.b", "模型-1", "a..b", "x" * 255, "a@b", "~", "$HOME"]
)
def test_plain_names_are_accepted(name: str) -> None:
    """In any script, with dots, dashes and spaces inside."""
    check_run_name(name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(name=st.text(max_size=12) | st.text("./\\~ \0-a\u2024\uff0f", max_size=6))
def test_an_accepted_name_is_one_folder_in_the_root(tmp_path: Path, name: str) -> None:
    """It is created there under exactly this name, and the storage contains nothing else."""
    try:
        check_run_name(name)
    except ConfigError:
        return
    directory = RunDirectory.open(str(tmp_path), name)
    assert posixpath.normpath(directory.path) == f"{tmp_path}/{name}"
    directory.create()
    assert [p.name for p in tmp_path.iterdir()] == [name]
    directory.delete()
    assert not list(tmp_path.iterdir())
