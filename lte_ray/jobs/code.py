"""lte-ray's own code for a job: as it runs here, whatever the cluster has installed.

It goes as a folder, not as a wheel: Ray installs a wheel with all that it depends on, torch and Ray among them, into a folder
that comes before the cluster's own packages, and it takes a wheel whose name it knows for the same wheel.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import lte_ray
from lte_ray import recipes
from lte_ray.errors import ConfigError

NAME = "lte_ray"


def copy_code(target: Path, wheel: Path | None = None) -> Path:
    """Copies the package and its ready-made workers to a folder, and returns the package there.

    Args:
        target: the folder.
        wheel: to take the package from; by default it is the one that runs.

    Raises:
        ConfigError: the file isn't a wheel of lte-ray.
    """
    package = target / NAME
    if wheel is not None:
        _extract(wheel, target)
        return package
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(lte_ray.__file__).parent, package, ignore=skip)
    for folder in recipes.__path__[1:]:  # in a checkout they lie elsewhere
        shutil.copytree(
            folder, package / "recipes", ignore=shutil.ignore_patterns("__pycache__", "__init__.py"), dirs_exist_ok=True
        )
    return package


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(f"{NAME}/")]
            archive.extractall(target, names)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"--package is {str(wheel)!r}, which can't be read: {error}.") from error
    if not (target / NAME / "__init__.py").is_file():
        raise ConfigError(f"--package is {str(wheel)!r}, but it has no package {NAME}: it must be a wheel of lte-ray.")
