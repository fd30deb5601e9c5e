"""README and docs: examples run, and files, names, and links exist."""

from __future__ import annotations

import contextlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import PAGES, inline_code
from tests.support.ray_runs import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.ray
def test_the_readmes_program_runs(mine: Path, home: Path, local_ray: None) -> None:
    """As printed, with its policy, to the end."""
    names: dict[str, Any] = {}
    exec(BLOCKS[1], names)
    assert Path(names["result"].path).parent == home / "ray_results"
    assert (Path(names["result"].path) / "model.safetensors").exists()


def test_the_readmes_worker_is_twenty_lines() -> None:
    """A user's worker has at most 20 lines of code, without imports and blank lines."""
    lines = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith(("import", "from", "#"))]
    assert len(lines) <= 20


def test_the_readmes_tree_matches_the_package() -> None:
    """The tree has every file and folder of the package and nothing else."""
    tree = re.search(r"```text\n(lte_ray/ .*?)```", README, flags=re.DOTALL)
    assert tree is not None
    named = set(re.findall(r"^  (\S+)", tree[1], flags=re.MULTILINE))
    present = {
        p.name + ("/" if p.is_dir() else "") for p in (ROOT / "lte_ray").iterdir() if not p.name.startswith(("__", "py."))
    }
    assert named == present
    for folder in re.findall(r"^(\w+/)", tree[1], flags=re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_every_relative_link_has_a_target() -> None:
    """Relative links name files that exist, and headings of these files."""
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
                assert anchor in map(slug, headings), f"{page.name}: {target}#{anchor}"


def slug(heading: str) -> str:
    """Returns a heading's anchor, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_the_tests_that_from_lte_names_exist() -> None:
    """Each test that docs/from-lte.md names is a function of the unit tests."""
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/from-lte.md").read_text()))
    tests = "".join(file.read_text() for file in (ROOT / "tests" / "unit").rglob("test_*.py"))
    assert len(names) > 20
    assert names <= set(re.findall(r"^def (test_\w+)", tests, flags=re.MULTILINE))


def test_files_and_names_within_sentences_exist() -> None:
    """Paths in `lte_ray/`, `tests/` and so on are files or folders, and dotted names of `lte_ray` can be imported."""
    for code, page in inline_code().items():
        if re.fullmatch(r"(lte_ray|tests|benchmarks|workers|docs|cluster)/[\w./-]*", code):
            assert (ROOT / code).exists(), f"{page}: {code}"
        if found := re.match(r"lte_ray(\.\w+)+", code):
            assert resolves(found[0]), f"{page}: {code}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    with contextlib.suppress(AttributeError, ImportError):
        pkgutil.resolve_name(name)
        return True
    return False
