"""lte-ray's own code for a job."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lte_ray
from lte_ray import __main__
from lte_ray.errors import ConfigError
from lte_ray.jobs.code import copy_code
from lte_ray.recipes import RECIPES

ROOT = Path(__file__).parents[3]


def test_the_copy_runs_without_the_original(tmp_path: Path) -> None:
    """With its ready-made workers and its files that aren't Python, and without caches."""
    package = copy_code(tmp_path)
    assert package == tmp_path / "lte_ray"
    assert (package / "report" / "assets").is_dir()
    assert not list(package.rglob("__pycache__"))
    for spec in RECIPES.values():
        assert (package / "recipes" / f"{spec.partition(':')[0].rpartition('.')[2]}.py").is_file()
    script = "import lte_ray; print(lte_ray.__file__); from lte_ray.recipes.gpt import GPT; print(GPT.__name__)"
    command = [sys.executable, "-c", script]
    process = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines() == [str(package / "__init__.py"), "GPT"]


def test_a_wheel_gives_its_code(tmp_path: Path) -> None:
    """Only the package in it; another file is refused."""
    wheel = tmp_path / "lte_ray-9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lte_ray/__init__.py", "__version__ = '9.9'")
        archive.writestr("other/__init__.py", "")
    package = copy_code(tmp_path / "code", wheel)
    assert (package / "__init__.py").read_text() == "__version__ = '9.9'"
    assert not (tmp_path / "code" / "other").exists()
    with zipfile.ZipFile(tmp_path / "torch.whl", "w") as archive:
        archive.writestr("torch/__init__.py", "")
    with pytest.raises(ConfigError, match="it must be a wheel of lte-ray"):
        copy_code(tmp_path / "none", tmp_path / "torch.whl")
    with pytest.raises(ConfigError, match="which can't be read"):
        copy_code(tmp_path / "none", tmp_path / "missing.whl")


def test_python_m_lte_ray_is_the_command_line() -> None:
    """It prints the version, as the program does."""
    command = [sys.executable, "-m", "lte_ray", "--version"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout == f"lte-ray {lte_ray.__version__}\n"


def test_a_python_that_lacks_something_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that are looked for are those of the dependencies in pyproject.toml."""
    assert __main__.what_is_missing() == ""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {re.match(r"[\w-]+", each)[0].replace("-", "_") for each in project["dependencies"]}  # type: ignore[index]
    assert set(__main__.NEEDED) == packages
    monkeypatch.setattr(__main__, "NEEDED", ("torch", "no_such_module"))
    text = __main__.what_is_missing()
    assert f"{sys.executable}, has no no_such_module, which lte-ray needs" in text
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert "but lte-ray needs 3.11 or newer" in __main__.what_is_missing()
