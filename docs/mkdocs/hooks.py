"""What the site adds to the pages in docs/: pages of the repository's root, links to its files, and the output of commands.

The pages are written for GitHub, where a relative link may lead to any file. In the site a link to a file that is no page
leads to the repository.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROOT_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files in the repository's root that are pages of the site, and their names there."""

COMMANDS_PAGE = "reference/cli.md"
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root."""
    for source, name in ROOT_PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turns links to files into links of the site, and shows what commands print."""
    if page.file.src_uri == COMMANDS_PAGE:
        markdown = re.sub(r"^```sh\n(.*?)\n```$", _with_output, markdown, flags=re.MULTILINE)
    parts, start = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_with_links(markdown[start : fence.start()], page, config), fence[0]]
        start = fence.end()
    return "".join([*parts, _with_links(markdown[start:], page, config)])


def _with_links(markdown: str, page: Page, config: MkDocsConfig) -> str:
    folder = Path(str(page.file.abs_src_path)).parent

    def replace(link: re.Match[str]) -> str:
        return f"]({_address(folder / link[1], page, config) or link[1]}{link[2] or ''})"

    return LINK.sub(replace, markdown)


def _address(target: Path, page: Page, config: MkDocsConfig) -> str | None:
    """Returns a file's address as seen from a page, or None if there is no such file, for MkDocs to complain."""
    path = Path(os.path.normpath(target))
    if not path.exists() or not path.is_relative_to(ROOT):
        return None
    name = path.relative_to(ROOT).as_posix()
    if path.is_relative_to(DOCS) and path.is_file():
        return os.path.relpath(path.relative_to(DOCS), Path(page.file.src_uri).parent)
    if name in ROOT_PAGES:
        return os.path.relpath(ROOT_PAGES[name], Path(page.file.src_uri).parent)
    return f"{config.repo_url}/{'tree' if path.is_dir() else 'blob'}/main/{name}"


def _with_output(block: re.Match[str]) -> str:
    program, *arguments = block[1].split()
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise PluginError(f"`{block[1]}` in {COMMANDS_PAGE} failed:\n{result.stderr}")
    return f"{block[0]}\n\n```text\n{result.stdout.rstrip()}\n```"
