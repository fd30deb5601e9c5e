"""Every notebook in the documentation runs from its first cell to its last, on a Ray of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ray_runs import ROOT

NOTEBOOKS = sorted(path.name for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder and a new home, with all classes and functions defined in its cells; it asserts its own results."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for variable in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "work").mkdir()
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "work")}}).execute()
    assert all(cell["execution_count"] for cell in notebook.cells if cell["cell_type"] == "code")
