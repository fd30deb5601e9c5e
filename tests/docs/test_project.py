"""The files that describe the project to others: one version, one address, and a complete reference."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import lte_ray
from lte_ray.config import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_stands_in_one_place() -> None:
    """The build reads it from `lte_ray/__init__.py`, and CITATION.cff has no copy of it."""
    assert "version" not in PYPROJECT["project"]
    assert "version" in PYPROJECT["project"]["dynamic"]
    path = ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{lte_ray.__version__}"\n' in path.read_text()
    assert "version" not in _yaml("CITATION.cff")


def test_the_version_is_one_that_a_release_can_have() -> None:
    """Three numbers, as SemVer and the changelog's headings want it."""
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", lte_ray.__version__)


def test_every_file_names_the_same_repository() -> None:
    """Package metadata, citation, site, security policy and issue templates."""
    address = PYPROJECT["project"]["urls"]["Repository"]
    assert _yaml("CITATION.cff")["repository-code"] == address
    assert _yaml("mkdocs.yml")["repo_url"] == address
    pattern = re.compile(rf"https://github\.com/[\w-]+/{address.rsplit('/', 1)[1]}\b")
    for page in ["pyproject.toml", "SECURITY.md", ".github/ISSUE_TEMPLATE/config.yml"]:
        found = set(pattern.findall((ROOT / page).read_text()))
        assert found == {address}, page


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("python", [f"lte_ray.{name}" for name in lte_ray.__all__ if not name.endswith("Config")]),
        ("settings", [f"lte_ray.config.{section.__name__}" for section in SECTIONS]),
    ],
)
def test_the_reference_has_every_public_name(page: str, names: list[str]) -> None:
    """Each name of `lte_ray.__all__` and each settings class has an entry."""
    assert set(names) <= set(re.findall(r"^::: (\S+)$", (ROOT / f"docs/reference/{page}.md").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_call_targets_that_exist(workflow: Path) -> None:
    """Each `make TARGET` in a workflow is a target of the Makefile, and each script is in the repository."""
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    called = [run for job in jobs for step in job["steps"] for run in _commands(job, step)]
    assert called
    for command in called:
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets, command
        assert all((ROOT / script).exists() for script in re.findall(r"^\.ci/\S+", command)), command


def _commands(job: dict[str, Any], step: dict[str, Any]) -> list[str]:
    """The command of a step, once for each row of the job's matrix."""
    rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
    run = step.get("run", "")
    return [re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name, row=row: str(row.get(name[1], name[0])), run) for row in rows]


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_lowest_versions_are_those_of_the_ranges() -> None:
    """`make test-lowest` installs the lower end of every range that the library and its tests need."""
    groups = [PYPROJECT["project"]["dependencies"], PYPROJECT["dependency-groups"]["test"]]
    groups += PYPROJECT["project"]["optional-dependencies"].values()
    ranges = dict(re.findall(r"^([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", "\n".join(itertools.chain(*groups)), flags=re.MULTILINE))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-lowest.txt").read_text(), flags=re.MULTILINE))
    assert pins.keys() == ranges.keys()
    assert {name: _release(pins[name]) for name in ranges} == {name: _release(lowest) for name, lowest in ranges.items()}


def _release(version: str) -> list[int]:
    """A version's numbers without trailing zeros."""
    return [int(number) for number in re.sub(r"(\.0)+$", "", version).split(".")]


def test_extras_that_pages_and_messages_name_exist() -> None:
    """Each `lte-ray[NAME]` in the documentation, the library and the ready-made workers can be installed."""
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    files = [*ROOT.glob("*.md"), *(path for folder in ("docs", "lte_ray", "workers") for path in (ROOT / folder).rglob("*"))]
    for file in files:
        if file.suffix in {".md", ".py", ".toml"}:
            named = re.findall(r"lte-ray\[([\w,-]+)\]", file.read_text())
            assert {extra for names in named for extra in names.split(",")} <= extras, file
