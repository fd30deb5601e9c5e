"""The documentation is true: its examples run, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.ray_runs import LONG, ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@LONG
@pytest.mark.ray
def test_the_readmes_program_runs(mine: Path, home: Path, local_ray: None) -> None:
    """With its policy, as printed and to its end."""
    names: dict[str, Any] = {}
    exec(BLOCKS[1], names)
    assert Path(names["result"].path).parent == home / "ray_results"
    assert (Path(names["result"].path) / "model.safetensors").exists()


def test_the_readmes_worker_is_twenty_lines() -> None:
    """A user's worker is short: 20 lines of code, imports and blank lines aside."""
    lines = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith(("import", "from", "#"))]
    assert len(lines) <= 20


def test_the_readmes_tree_names_what_there_is() -> None:
    """Every file and folder of the library is in the tree, and nothing else."""
    tree = re.search(r"```text\n(lte_ray/ .*?)```", README, flags=re.DOTALL)
    assert tree is not None
    named = set(re.findall(r"^  (\S+)", tree[1], flags=re.MULTILINE))
    there = {p.name + ("/" if p.is_dir() else "") for p in (ROOT / "lte_ray").iterdir() if not p.name.startswith(("__", "py."))}
    assert named == there
    for folder in re.findall(r"^(\w+/)", tree[1], flags=re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_every_link_and_file_that_the_documentation_names_exists() -> None:
    """Relative links lead somewhere."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
