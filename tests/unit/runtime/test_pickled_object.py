"""Workers on their way to other processes: from a file, from a package, from a script."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from lte_ray import file_modules
from lte_ray.errors import WorkerError
from lte_ray.import_object import load_object
from lte_ray.runtime.context import PickledObject

ROOT = Path(__file__).parents[3]

LOAD = """
import pickle, sys, traceback
try:
    print(pickle.load(open(sys.argv[1], "rb")).load().use())
except ValueError:
    print(traceback.format_exc())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the user's files. Imports and sys.path are restored afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(file_modules, "_folders", set())
    (tmp_path / "user").mkdir()
    yield tmp_path / "user"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, **files: str) -> None:
    """Writes Python files; two underscores in a name stand for a folder."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True, check=False)


def used_elsewhere(path: Path) -> str:
    """What `use` of an instance of Net returns in another process, whose path doesn't have the file's folder."""
    kind = load_object(f"{path}:Net", what="WORKER", error=WorkerError)
    sent = dataclasses.replace(PickledObject.pickle(kind()), paths=())
    (path.parent / "net.pickle").write_bytes(pickle.dumps(sent))
    return finish(run("-c", LOAD, str(path.parent / "net.pickle"), cwd=Path("/")))


def finish(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


GLOBALS = {
    "lru_cache": ("from functools import lru_cache\n@lru_cache\ndef load(): return 7", "load()"),
    "cache": ("from functools import cache\n@cache\ndef count(n): return count(n - 1) + 1 if n else 0", "count(7)"),
    "singledispatch": (
        "from functools import singledispatch\n@singledispatch\ndef f(x): return 7\n"
        "@f.register\ndef _(x: list): return [f(y) for y in x]",
        "f([1])[0]",
    ),
    "lock": ("from threading import Lock\nLOCK = Lock()", "7 if LOCK.acquire() else 0"),
    "generator": ("numbers = iter(n for n in [7])", "next(numbers)"),
    "jit": ("import torch\n@torch.jit.script\ndef seven(x: int) -> int: return x + 1", "seven(6)"),
    "dataclass": (
        "from dataclasses import dataclass, field, fields\n@dataclass\nclass Config:\n    size: int = 7\n"
        "    more: list[int] = field(default_factory=list)",
        "Config().size if len(fields(Config)) == 2 else 0",
    ),
}


def test_a_file_may_have_any_globals(folder: Path) -> None:
    """Each process makes its own, so nothing of them is pickled."""
    tops, expressions = zip(*GLOBALS.values(), strict=True)
    write(folder, net="\n".join(tops) + f"\nclass Net:\n    def use(self): return [{', '.join(expressions)}]\n")
    assert used_elsewhere(folder / "net.py") == str([7] * len(GLOBALS))


def test_a_default_of_a_dataclass_stays_a_member_of_its_enum(folder: Path) -> None:
    """The worker itself may be a dataclass; identity of the file's own objects is kept."""
    text = """
        from dataclasses import dataclass
        from enum import Enum
        class Kind(Enum): A = 1
        MISSING = object()
        @dataclass
        class Net:
            kind: Kind = Kind.A
            def use(self): return (self.kind is Kind.A, self == Net())
    """
    write(folder, net=text)
    assert used_elsewhere(folder / "net.py") == "(True, True)"


@pytest.mark.parametrize("init", [True, False])
def test_relative_imports_of_siblings_and_packages(folder: Path, init: bool) -> None:
    """Of a package, or of a plain folder; the importing file is run once."""
    files = {
        "pkg__net": "from . import one\nfrom .deep.data import load\nclass Net:\n    def use(self): return load() + one.ONE",
        "pkg__one": "ONE = 1",
        "pkg__deep__data": "from functools import cache\nfrom ..one import ONE\n@cache\ndef load(): return ONE + 5",
    }
    write(folder, **files)
    if init:
        (folder / "pkg" / "__init__.py").write_text("from .net import Net\n")
        (folder / "pkg" / "deep" / "__init__.py").write_text("")
    assert used_elsewhere(folder / "pkg" / "net.py") == "7"
    assert sum(name.endswith(".net") for name in sys.modules if name.startswith(file_modules.FILE_MODULE_PREFIX)) == 1


def test_relative_imports_above_the_file(folder: Path) -> None:
    """The outermost package is the one that the dots reach."""
    write(
        folder, pkg__sub__net="from ..helper import SEVEN\nclass Net:\n    def use(self): return SEVEN", pkg__helper="SEVEN = 7"
    )
    assert used_elsewhere(folder / "pkg" / "sub" / "net.py") == "7"


def test_another_node_needs_none_of_the_files(folder: Path) -> None:
    """Neighbors that the file has imported are sent with it, but nothing that is installed."""
    write(
        folder,
        pkg__net="import torch, plain_h\nfrom .helper import SIX\nclass Net:\n    def use(self): return SIX + plain_h.ONE",
        pkg__helper="SIX = 6",
        pkg__plain_h="ONE = 1",
    )
    kind = load_object(f"{folder}/pkg/net.py:Net", what="WORKER", error=WorkerError)
    sent = dataclasses.replace(PickledObject.pickle(kind()), paths=())
    assert sum(str(folder) in module.path for module in sent.modules) == 4  # the package, and its three files
    (folder.parent / "net.pickle").write_bytes(pickle.dumps(sent))
    (folder / "pkg").rename(folder / "gone")
    assert finish(run("-c", LOAD, "net.pickle", cwd=folder.parent)) == "7"


def test_a_traceback_shows_the_lines_of_a_file_that_this_node_lacks(folder: Path) -> None:
    """They come with the source."""
    write(folder, net="class Net:\n    def use(self):\n        raise ValueError('here')")
    kind = load_object(f"{folder}/net.py:Net", what="WORKER", error=WorkerError)
    (folder.parent / "net.pickle").write_bytes(pickle.dumps(PickledObject.pickle(kind())))
    (folder / "net.py").unlink()
    ended = run("-c", LOAD, "net.pickle", cwd=folder.parent)
    assert "net.py\", line 3, in use\n    raise ValueError('here')" in finish(ended)


SCRIPT = """
    import pickle, sys
    from lte_ray.runtime.context import PickledObject
    {top}
    class Net:
        def use(self): return {expression}
    pickle.dump(PickledObject.pickle(Net()), open("net.pickle", "wb"))
"""


def script(top: str, expression: str) -> str:
    return textwrap.dedent(SCRIPT).replace("{top}", top).replace("{expression}", expression)


def test_a_class_of_a_script_may_use_caches_and_locks(folder: Path) -> None:
    """As in a notebook, the class is pickled by value. Its caches and locks are replaced by new ones in other processes."""
    kinds = ["lru_cache", "cache", "singledispatch", "lock", "dataclass"]
    tops, expressions = zip(*(GLOBALS[kind] for kind in kinds), strict=True)
    (folder / "run.py").write_text(script("\n".join(tops), f"[{', '.join(expressions)}]"))
    finish(run("run.py", cwd=folder))
    assert finish(run("-c", LOAD, "net.pickle", cwd=folder)) == str([7] * len(kinds))


@pytest.mark.parametrize(("kind", "name"), [("generator", "numbers"), ("jit", "seven")])
def test_a_global_of_a_script_that_cannot_be_sent_is_named(folder: Path, kind: str, name: str) -> None:
    """The error says where it is used, and that a file is the way."""
    (folder / "run.py").write_text(script(*GLOBALS[kind]))
    ended = run("run.py", cwd=folder)
    assert f"Net can't be sent to other processes: its code uses {name}, a global of __main__ that is a " in ended.stderr
    assert "give it as path/to/file.py:Class" in ended.stderr


def test_an_attribute_that_cannot_be_sent_is_named(folder: Path) -> None:
    """Settings belong in attributes, open files don't."""
    write(folder, net="class Net:\n    def __init__(self): self.rows = (n for n in [7])")
    kind = load_object(f"{folder}/net.py:Net", what="WORKER", error=WorkerError)
    with pytest.raises(WorkerError, match=r"its attribute rows is a generator: .*Keep settings only in its attributes"):
        PickledObject.pickle(kind())
