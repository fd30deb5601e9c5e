"""Reads the documentation's pages: their code blocks, and the commands and flags that they name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

GENERATED = {"docs/rejected-input.md"}
"""Pages that programs write."""

PAGES = tuple(
    path
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    if path.relative_to(ROOT).as_posix() not in GENERATED
)

LANGUAGES = {"sh", "text", "python", "toml", "json", "diff"}
"""What a code block may be: commands to type, what they print, or the content of a file."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    language: str
    text: str


def blocks(language: str = "") -> list[Block]:
    """Returns the code blocks of all pages, or those of one language."""
    found = [Block(page.relative_to(ROOT).as_posix(), *match) for page in PAGES for match in FENCE.findall(page.read_text())]
    return [block for block in found if language in ("", block.language)]


def page_blocks(page: str, language: str) -> list[str]:
    """Returns the texts of one page's code blocks of one language."""
    return [block.text for block in blocks(language) if block.page == page]


def commands() -> dict[str, str]:
    """Returns each command of the `sh` blocks, without its comment, and the page that has it first."""
    found: dict[str, str] = {}
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s+)#.*$", "", line).strip()
            if command:
                found.setdefault(re.sub(r"\s+", " ", command), block.page)
    return found


def inline_code() -> dict[str, str]:
    """Returns each piece of code within the pages' sentences and tables, and the page that has it first."""
    found: dict[str, str] = {}
    for page in PAGES:
        prose = FENCE.sub("", page.read_text())
        for code in re.findall(r"`([^`]+)`", prose):
            found.setdefault(re.sub(r"\s+", " ", code), page.relative_to(ROOT).as_posix())
    return found


def write_files(folder: Path) -> None:
    """Writes the files that commands name: the README's mine.py, and those of other pages: my_policies.py, llama.py."""
    (folder / "mine.py").write_text(page_blocks("README.md", "python")[0])
    (folder / "llama.py").write_text(page_blocks("docs/plan.md", "python")[1])
    policies = [text for text in page_blocks("docs/merge-policies.md", "python") if text.startswith("# my_policies.py")]
    (folder / "my_policies.py").write_text("\n".join(policies))
