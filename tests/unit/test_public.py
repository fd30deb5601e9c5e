"""The public names of `import lte_ray`, and what it doesn't load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lte_ray


def test_all_is_sorted_and_importable() -> None:
    """`__all__` is sorted, and each of its names is the name of its object."""
    assert list(lte_ray.__all__) == sorted(set(lte_ray.__all__))
    assert all(getattr(lte_ray, name).__name__ == name for name in lte_ray.__all__)
    assert set(lte_ray.__all__) <= set(dir(lte_ray))


def test_the_settings_of_a_trainer_are_public() -> None:
    """`lte_ray` alone is enough to write a run's settings. Replacements of Ray's classes are in `lte_ray.config`."""
    assert {"LTEConfig", "MergeConfig", "TrainConfig", "FailureConfig"} <= set(lte_ray.__all__)


def test_nothing_else_is_public() -> None:
    """Names without an underscore are those of `__all__`, submodules, or imports of the file."""
    code = "import lte_ray; print(*(n for n in dir(lte_ray) if not n.startswith('_')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) - {"annotations", "importlib", "TYPE_CHECKING", "Any"} == set(lte_ray.__all__)


def test_type_checkers_see_the_same_names() -> None:
    """The stub imports each public name from the module that defines it, and the submodules."""
    stub = ast.parse(Path(lte_ray.__file__).with_suffix(".pyi").read_text())
    imports = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imports == lte_ray._DEFINED_IN | dict.fromkeys(lte_ray._SUBMODULES, "lte_ray")


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As with any module."""
    with pytest.raises(AttributeError, match="module 'lte_ray' has no attribute 'Nothing'"):
        lte_ray.Nothing  # noqa: B018 - the access is tested


@pytest.mark.parametrize("module", ["lte_ray", "lte_ray.config", "lte_ray.errors", "lte_ray.layout", "lte_ray.messages"])
def test_import_loads_neither_ray_nor_tyro_nor_torch(module: str) -> None:
    """A fresh Python that imports the module has loaded none of the heavy libraries."""
    code = f"import sys, {module}; print(*sorted({{'ray', 'tyro', 'torch', 'pyarrow', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_submodules_are_loaded_when_they_are_first_used() -> None:
    """`lte_ray.testing` needs no separate import, and isn't loaded before."""
    code = "import sys, lte_ray; print('lte_ray.testing' in sys.modules, lte_ray.testing.check_policy.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "False check_policy\n"
    )


def test_the_submodules_that_the_documentation_uses_need_no_import() -> None:
    """`lte_ray.worker`, `export` and `config` are there in a fresh Python, whatever was used before."""
    code = (
        "import lte_ray; print(lte_ray.worker.build_model.__name__, lte_ray.export.safetensors.__name__, "
        "lte_ray.config.PlacementConfig.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "build_model safetensors PlacementConfig\n"


def test_the_authors_module_paths_hold_the_public_classes() -> None:
    """`lte.base`, `lte.prepare` and `lte.replica`, by attribute or import, without Ray."""
    code = (
        "import sys, lte_ray, lte_ray.base, lte_ray.prepare, lte_ray.replica as replica; "
        "assert lte_ray.base.LTELayer is lte_ray.LTELayer and lte_ray.base.ReplicaLayer is lte_ray.ReplicaLayer; "
        "assert lte_ray.prepare.prepare_model_for_lte is lte_ray.prepare_model_for_lte; "
        "assert replica.MultiheadReplicaLayer is lte_ray.MultiheadReplicaLayer; print('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_engine_and_the_trainer_load_no_ray() -> None:
    """Ray isn't loaded by anything below the runtime, nor by the trainer before it is used."""
    code = "import sys, lte_ray.engine.in_process, lte_ray.checkpoint, lte_ray.trainer; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
