"""Modules that are loaded from a file: they have private names, and other processes import them from source that is sent along.

Sending source, unlike pickling by value, keeps everything that a module may hold: caches (`functools.lru_cache`), locks,
generators, functions compiled by torch. Each process makes its own.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

FILE_MODULE_PREFIX = "lte_ray_user_"
"""Prefix of modules loaded from a file. No process finds them on its path."""

INIT = "__init__.py"


@dataclass(frozen=True)
class SourceModule:
    """A module as source: its full name, the file that it comes from, and the file's content."""

    name: str
    path: str
    source: bytes

    @property
    def is_private(self) -> bool:
        """Whether no process finds it on its path."""
        return self.name.startswith(FILE_MODULE_PREFIX)


class _Loader(SourceLoader):
    def __init__(self, module: SourceModule) -> None:
        self._module = module

    def get_filename(self, fullname: str) -> str:
        return self._module.path

    def get_data(self, path: str | bytes) -> bytes:
        if path != self._module.path:
            raise OSError(f"there is only the source of {self._module.path}")
        return self._module.source


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.modules: dict[str, SourceModule] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        module = self.modules.get(fullname)
        if module is None:
            return None
        # What wasn't sent, since it was never imported, is looked for in the folder, if this node has it.
        folder = [os.path.dirname(module.path)] if os.path.basename(module.path) == INIT else None
        return spec_from_file_location(fullname, module.path, loader=_Loader(module), submodule_search_locations=folder)


_private, _neighbors = _Finder(), _Finder()
_folders: set[str] = set()  # of files that were loaded here


def load_file(path: Path) -> ModuleType:
    """Imports a file under a private name. The same file gives the same module.

    It may import its neighbors, as when Python runs the file. If it has relative imports, it belongs to the outermost package
    that it is in; without an ``__init__.py`` its folder is the package.
    """
    source = path.read_bytes()
    level = _relative_level(source)
    if level:
        root = _package_folder(path, level)
        package, parts = _private_name(root, root.name), path.relative_to(root).with_suffix("").parts
        init = root / INIT
        offer([SourceModule(package, str(init), init.read_bytes() if init.is_file() else b"")])
        name = ".".join([package, *(part for part in parts if part != "__init__")])
    else:
        root, name = path.parent, _private_name(path, path.stem)
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    if level and str(root.parent) not in sys.path:  # a package may import its own modules by their full names
        sys.path.append(str(root.parent))
    _folders.add(str(root))
    offer([SourceModule(name, str(path), source)])
    return importlib.import_module(name)


def _private_name(path: Path, name: str) -> str:
    return f"{FILE_MODULE_PREFIX}{re.sub(r'[^0-9A-Za-z_]', '_', name)}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _relative_level(source: bytes) -> int:
    """Returns the most dots that a relative import begins with; 0 if there is none, or if the source isn't Python."""
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):  # importing the file says it better
        return 0
    return max((node.level for node in nodes if isinstance(node, ast.ImportFrom)), default=0)


def _package_folder(path: Path, level: int) -> Path:
    """Returns the folder of the outermost package that the file is in: at least the one that its relative imports reach."""
    outermost = 0
    while (path.parents[outermost] / INIT).is_file() and (path.parents[outermost + 1] / INIT).is_file():
        outermost += 1
    return path.parents[min(max(outermost, level - 1), len(path.parents) - 1)]


def loaded_modules() -> tuple[SourceModule, ...]:
    """Returns the source of the modules that were loaded from files here, and of neighbors that these have imported."""
    modules = []
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path is None and name.startswith(FILE_MODULE_PREFIX):  # a folder without __init__.py
            modules.append(SourceModule(name, os.path.join(next(iter(module.__path__)), INIT), b""))
        elif path and path.endswith(".py") and (name.startswith(FILE_MODULE_PREFIX) or _is_neighbor(name, path)):
            loader = getattr(module, "__loader__", None)
            try:
                source = loader.get_data(path) if isinstance(loader, _Loader) else Path(path).read_bytes()
            except OSError:  # other nodes look for it on their paths
                continue
            modules.append(SourceModule(name, path, source))
    return tuple(modules)


def _is_neighbor(name: str, path: str) -> bool:
    """Whether a module lies in the folder of a loaded file, and isn't installed there."""
    if name.partition(".")[0] in ("__main__", "lte_ray"):
        return False
    return _is_inside(path, _folders) and not _is_inside(path, _installed())


def _is_inside(path: str, folders: Iterable[str]) -> bool:
    return any(path.startswith(f"{folder}{os.sep}") for folder in folders)


def _installed() -> Iterator[str]:
    yield from {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def offer(modules: Iterable[SourceModule]) -> None:
    """Makes modules importable in this process. One that this process finds on its path isn't replaced."""
    if _private not in sys.meta_path:
        sys.meta_path.insert(0, _private)
        sys.meta_path.append(_neighbors)
    for module in modules:
        (_private if module.is_private else _neighbors).modules[module.name] = module
