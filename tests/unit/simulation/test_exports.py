"""What `lte_ray.simulation` exports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from lte_ray import simulation


def test_type_checkers_see_the_same_names() -> None:
    """Every exported name exists, and the stub imports it from the module that defines it."""
    stub = ast.parse(Path(simulation.__file__).with_suffix(".pyi").read_text())
    imports = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(imports) == set(simulation.__all__)
    for name, module in imports.items():
        assert getattr(simulation, name) is getattr(sys.modules[module], name)


def test_a_record_can_be_imported_without_torch() -> None:
    """The command line shows records and its help without loading torch."""
    code = "import sys; from lte_ray.simulation import KINDS, SimulationRecord; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
