"""Untrusted settings execute nothing and end in one clear error; links aren't followed."""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte_ray.cli.flags import Parsed
from lte_ray.cli.main import main
from lte_ray.config import SECTIONS
from lte_ray.errors import ConfigError, UserError
from lte_ray.storage import RunDirectory
from tests.support.config_files import GOOD, parse_config

ROOT = Path(__file__).resolve().parents[3]

EXECUTING = {"eval", "exec", "compile", "__import__"}
UNPICKLING = {"pickle", "dill", "marshal", "shelve", "joblib", "yaml", "subprocess"}


def test_the_library_executes_nothing_that_it_reads() -> None:
    """No eval, exec, torch.load or numpy.load. Only `PickledObject`, which carries objects within one run, unpickles.

    `lte_ray.check` opens what it has made itself, as an actor would, and the probe of a node what the driver sends with it. The
    only program that is started is git, with fixed arguments, in the worker's folder.
    """
    found = []
    for file in sorted((ROOT / "lte_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                found += [f"{where} imports {m}" for m in modules if m.partition(".")[0] in UNPICKLING]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in EXECUTING or called in ("torch.load", "np.load", "numpy.load", "os.system", "os.popen"):
                    found.append(f"{where} calls {called}")
                if "pickle" in called and called.rpartition(".")[2] in ("load", "loads", "Unpickler"):
                    found.append(f"{where} calls {called}")
                found += [f"{where} gives {k.arg}" for k in node.keywords if k.arg in ("weights_only", "allow_pickle", "shell")]
    probe = ["lte_ray/runtime/node_probe.py"] * 2  # imports and calls
    expected = ["lte_ray/checking/sending.py", "lte_ray/run/environment.py", "lte_ray/runtime/context.py", *probe]
    assert [f.partition(":")[0] for f in found] == expected, found
    assert "imports subprocess" in found[1]


def test_only_the_actors_of_a_run_unpickle() -> None:
    """The trainer makes each `PickledObject`, and actors open it. No module that reads storage knows it."""
    users = {
        str(file.relative_to(ROOT / "lte_ray"))
        for file in (ROOT / "lte_ray").rglob("*.py")
        if "PickledObject" in file.read_text()
    }
    assert "runtime/context.py" in users
    makers = {"trainer.py", "ladder/ray_runner.py", "checking/sending.py", "sweep/ray_trials.py", "sweep/trial_actor.py"}
    assert all(user.startswith("runtime/") or user in makers for user in users), users


EVIL = """
from pathlib import Path
Path({marker!r}).write_text("executed")
class Evil: ...
"""


@pytest.fixture
def evil(tmp_path: Path) -> tuple[str, Path]:
    """A file that writes a marker when it is imported: how settings would name it, and the marker's path."""
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return f"{tmp_path / 'evil.py'}:Evil", marker


KEYS = sorted(field.name for kind in SECTIONS for field in dataclasses.fields(kind))


@pytest.mark.parametrize("key", [k for k in KEYS if k != "policy"])
def test_no_setting_but_the_policy_names_code(tmp_path: Path, evil: tuple[str, Path], key: str) -> None:
    """A file for --config imports nothing, even if another setting, or one of the worker's, names a module."""
    name, marker = evil
    file = tmp_path / "x.toml"
    for value in (name, [name], {"a": name}):
        file.write_text(tomli_w.dumps({"program": name, key: value, "worker": {"lr": name}}))
        parse_config(file)
        assert not marker.exists()


scalars = (
    st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["--overwrite", "--help", "None", "-1"])
)
values = st.recursive(
    scalars | st.dates(), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(key=st.sampled_from([*KEYS, "worker", "policy_args", "omitted", "program", "else"]), value=values)
def test_any_value_for_any_setting_is_accepted_or_one_error(tmp_path: Path, key: str, value: Any) -> None:
    """Settings, a UserError, or exit code 2; never another exception. No text in the file is read as a flag."""
    if key == "policy" and isinstance(value, str) and ":" in value:
        return
    file = tmp_path / "x.toml"
    try:
        file.write_text(tomli_w.dumps({"num_heads": 3, key: value}), encoding="utf-8")
    except (TypeError, ValueError):  # lone surrogates
        return
    found = parse_config(file)
    assert isinstance(found, Parsed | UserError) or found == 2, found
    if isinstance(found, Parsed) and key != "overwrite":
        assert not found.storage.overwrite
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.toml"]


MALFORMED: dict[str, bytes] = {
    "cut off": b'name = "a',
    "binary": bytes(range(256)),
    "UTF-16": 'name = "a"'.encode("utf-16"),
    "latin": 'name = "\xfc"'.encode("latin-1"),
    "NUL": b'name = "a\0"',
    "twice": b"steps = 1\nsteps = 2",
    "deep arrays": b"a = " + b"[" * 50_000 + b"]" * 50_000,
    "deep tables": b"a = " + b"{a = " * 5_000 + b"1" + b"}" * 5_000,
    "deep keys": b"a." * 5_000 + b"a = 1",
    "deep policy": b"policy." + b"a." * 3_000 + b"a = 1",
    "long number": b"steps = " + b"9" * 5_000,
    "long hexadecimal": b"steps = 0x" + b"f" * 50_000,
    "65 bits": b"steps = 18446744073709551616",
    "NaN": b"lora_alpha = nan",
    "infinite": b"merge_iter = inf",
    "a table as number": b"[steps]\na = 1",
    "a table as text": b"[name]\na = 1",
    "lists of lists": b"exclude = [['a']]",
    "a flag in a list": b"exclude = ['a', '--overwrite']",
    "help in a list": b"exclude = ['--help']",
    "worker as text": b"worker = 'a'",
    "arguments as text": b"policy_args = 'a'",
    "policy as number": b"policy = 5",
    "policy as flag": b"policy = '--help'",
    "unknown": b"stepz = 5",
    "omitted by hand": b"omitted = ['worker.lr']",
    "omitted as text": b"program = 'a:B'\nomitted = 'worker.lr'",
    "omitted numbers": b"program = 'a:B'\nomitted = [1]",
    "dates": b"steps = 2026-01-01",
    "megabytes": b"# " + b"x" * (1 << 20),
}


@pytest.mark.parametrize("case", list(MALFORMED))
def test_malformed_files_are_one_error(capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str) -> None:
    """Exit code 2 from the command line, no traceback, no file, and a short message."""
    file = tmp_path / "x.toml"
    file.write_bytes(MALFORMED[case])
    try:
        code = main(["train", GOOD, "--config", str(file), "--storage", str(tmp_path / "runs")])
    except SystemExit as leaving:
        code = leaving.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert code == 2, said
    assert "Traceback" not in said.err
    assert 20 < len(said.err) < 2_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.toml"]


@pytest.mark.parametrize("place", ["folder", "missing", "device", "file in a file", "NUL"])
def test_a_path_that_is_not_a_file_is_one_error(tmp_path: Path, place: str) -> None:
    """Also an endless device, of which only the first megabyte is read."""
    (tmp_path / "file").write_text("")
    places = {"folder": ".", "missing": "x.toml", "device": "/dev/zero", "file in a file": "file/x.toml", "NUL": "a\0b"}
    found = parse_config(tmp_path / places[place])
    assert isinstance(found, ConfigError)
    assert str(found).startswith("--config ")


@pytest.mark.parametrize("what", ["run", "checkpoints", "checkpoint", "file"])
def test_links_are_removed_and_never_followed(tmp_path: Path, what: str) -> None:
    """--overwrite and pruning delete the link itself, anywhere in the run directory."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    directory = RunDirectory.open(str(tmp_path / "runs"), "a")
    if what != "run":
        directory.create()
    places = {"run": "", "checkpoints": "checkpoints", "checkpoint": "checkpoints/000001", "file": "checkpoints/000001/base"}
    link = Path(directory.path_to(places[what]))
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(outside / "precious" if what == "file" else outside, link)
    directory.delete(places[what])
    assert not os.path.lexists(link)
    os.symlink(outside / "precious" if what == "file" else outside, link)
    directory.delete()
    assert not os.path.lexists(directory.path)
    assert (outside / "precious").read_text() == "x"
