"""Importing a user's class from a module or file, and every way in which that fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lte_ray.errors import ConfigError, WorkerError
from lte_ray.file_modules import FILE_MODULE_PREFIX
from lte_ray.import_object import absolute, is_object_path, load_object, load_worker, worker_names
from lte_ray.merging.registry import find_policy
from lte_ray.recipes import RECIPES


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder. Imports and sys.path are restored afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(spec: str) -> object:
    return load_object(spec, what="WORKER", error=WorkerError)


def error_of(spec: str) -> WorkerError:
    with pytest.raises(WorkerError) as raised:
        load(spec)
    assert str(raised.value).startswith(f"WORKER {spec!r}: ") or "it must be" in str(raised.value)
    return raised.value


def test_a_class_of_an_installed_module() -> None:
    """package.module:Class gives the class itself."""
    from lte_ray.merging.policies.weighted import Average

    assert load("lte_ray.merging.policies.weighted:Average") is Average


def test_a_module_in_the_current_folder(folder: Path) -> None:
    """As with `python -m`, even if sys.path has the console script's folder instead."""
    (folder / "mine_a").mkdir()
    (folder / "mine_a" / "net.py").write_text("class Net: pass")
    assert load("mine_a.net:Net").__module__ == "mine_a.net"  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", ["sub/net.py:Net", "./sub/net.py:Net", "{folder}/sub/net.py:Net", "~/sub/net.py:Net"])
def test_a_class_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    """A relative, absolute or home path. The module's name can't be imported by other processes."""
    monkeypatch.setenv("HOME", str(folder))
    (folder / "sub").mkdir()
    (folder / "sub" / "net.py").write_text("class Net: size = 3")
    found = load(spec.format(folder=folder))
    assert found.size == 3  # type: ignore[attr-defined]
    assert found.__module__.startswith(FILE_MODULE_PREFIX + "net_")


def test_a_file_is_loaded_once_and_by_its_path(folder: Path) -> None:
    """The same file gives the same class, and another file of the same name another class."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "net.py").write_text(f"class Net: where = {name!r}")
    assert load("one/net.py:Net") is load(f"{folder}/one/../one/net.py:Net")
    assert load("two/net.py:Net").where == "two"  # type: ignore[attr-defined]


def test_a_file_may_import_its_siblings(folder: Path) -> None:
    """As when Python runs the file."""
    (folder / "sub").mkdir()
    (folder / "sub" / "sibling_b.py").write_text("SIZE = 7")
    (folder / "sub" / "net.py").write_text("import sibling_b\nclass Net: size = sibling_b.SIZE")
    assert load("sub/net.py:Net").size == 7  # type: ignore[attr-defined]


def test_dataclasses_in_a_file_work(folder: Path) -> None:
    """The module is registered while it runs, which dataclasses with deferred annotations need."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Net:\n    size: int = 3\n"
    (folder / "net.py").write_text(text)
    assert load("net.py:Net")().size == 3  # type: ignore[operator]


@pytest.mark.parametrize("spec", ["Net", "", ":Net", "module:", ":"])
def test_a_wrong_form_is_explained(spec: str) -> None:
    """The error names both forms, and has the type that the caller requested."""
    with pytest.raises(ConfigError) as raised:
        load_object(spec, what="--policy", error=ConfigError)
    assert str(raised.value) == f"--policy is {spec!r}, but it must be package.module:Class or path/to/file.py:Class."


@pytest.mark.parametrize(("spec", "missing"), [("nowhere_c:Net", "nowhere_c"), ("nowhere_c.sub:Net", "nowhere_c")])
def test_a_missing_module(folder: Path, spec: str, missing: str) -> None:
    """The error names the module, and the folder that was searched."""
    assert f"there is no module {missing} on Python's path or in {folder}" in str(error_of(spec))


def test_a_missing_submodule(folder: Path) -> None:
    """The error names the part that is missing, not the package."""
    (folder / "package_d").mkdir()
    (folder / "package_d" / "__init__.py").write_text("")
    assert "there is no module package_d.net on" in str(error_of("package_d.net:Net"))


@pytest.mark.parametrize("spec", ["none.py:Net", "sub/none.py:Net", "folder.py:Net"])
def test_a_missing_file(folder: Path, spec: str) -> None:
    """The error names the absolute path; a folder isn't a file."""
    (folder / "folder.py").mkdir()
    assert f"there is no file {folder / spec.removesuffix(':Net')}." in str(error_of(spec))


def test_a_missing_class_suggests_a_similar_name(folder: Path) -> None:
    """The error lists the classes of the module, but not those that it imports."""
    (folder / "net.py").write_text("from pathlib import Path\nclass Network: pass\nclass Other: pass\nvalue = 3")
    message = str(error_of("net.py:Netwrok"))
    assert "net.py has no Netwrok. Did you mean Network? Its classes are: Network, Other." in message
    (folder / "empty.py").write_text("")
    assert "empty.py has no Net. Its classes are: none." in str(error_of("empty.py:Net"))


@pytest.mark.parametrize("place", ["raising_e.py", "raising_e"])
def test_a_module_that_raises(folder: Path, place: str) -> None:
    """The error names what the module raised, chained. Once the file is fixed, another attempt succeeds."""
    file = folder / "raising_e.py"
    file.write_text("raise ValueError('boom')")
    error = error_of(f"{place}:Net")
    assert f"importing {place} raised ValueError: boom" in str(error)
    assert isinstance(error.__cause__, ValueError)
    file.write_text("class Net:\n    fixed = True\n")  # of another size: Python compares size and second
    assert load(f"{place}:Net").fixed  # type: ignore[attr-defined]


def test_a_module_with_a_syntax_error(folder: Path) -> None:
    """It is treated like a module that raises."""
    (folder / "wrong.py").write_text("class Net(:")
    assert "importing wrong.py raised SyntaxError" in str(error_of("wrong.py:Net"))


@pytest.mark.parametrize("place", ["importing_f.py", "importing_f"])
def test_an_import_inside_the_module_that_is_missing(folder: Path, place: str) -> None:
    """The error names the missing import, not the module itself."""
    (folder / "importing_f.py").write_text("import nowhere_g\nclass Net: pass")
    error = error_of(f"{place}:Net")
    assert f"importing {place} raised ModuleNotFoundError: No module named 'nowhere_g'" in str(error)


def test_a_relative_module_is_an_error_too() -> None:
    """`.module:Class` has no package to be relative to."""
    assert "importing .net raised" in str(error_of(".net:Net"))


def test_object_paths_have_a_colon() -> None:
    """A name with a colon isn't the name of a built-in policy."""
    assert is_object_path("a:B")
    assert is_object_path("a.py:B")
    assert not is_object_path("average")


def test_a_file_becomes_absolute_and_a_module_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of a worker and a policy in run.toml are valid in every folder."""
    monkeypatch.chdir(tmp_path)
    assert absolute("mine/net.py:Net") == f"{tmp_path}/mine/net.py:Net"
    assert absolute("package.module:Net") == "package.module:Net"
    assert absolute("average") == "average"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_by_its_short_name(name: str) -> None:
    """It is a class of `lte_ray.recipes`, whose files are those in the repository's `workers/`."""
    kind = load_worker(name)
    assert kind.__module__.startswith("lte_ray.recipes.")
    assert Path(sys.modules[kind.__module__].__file__ or "").parent == Path(__file__).parents[2] / "workers"


def install(folder: Path, package: str, entry_points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a package with entry points and a module of the same name on the path."""
    (folder / f"{package}.py").write_text("class Net: pass\nclass Rule:\n    def decide(self, pending, roster): pass\n")
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    if str(folder) not in sys.path:
        monkeypatch.syspath_prepend(str(folder))


def test_installed_packages_add_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of workers and of merge policies, as entry points."""
    points = "[lte_ray.workers]\nnet-e = package_e:Net\n[lte_ray.policies]\nrule-e = package_e:Rule\n"
    install(folder, "package_e", points, monkeypatch)
    assert load_worker("net-e").__module__ == "package_e"
    assert find_policy("rule-e").__name__ == "Rule"
    with pytest.raises(ConfigError, match=r"Installed packages add: rule-e\. Did you mean rule-e\?"):
        find_policy("rule-f")


def test_a_name_that_two_packages_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't chosen by chance."""
    for package in ("package_f", "package_g"):
        install(folder, package, f"[lte_ray.workers]\ngpt = {package}:Net\n", monkeypatch)
    with pytest.raises(WorkerError) as raised:
        load_worker("gpt")
    assert sorted(worker_names()["gpt"]) == ["lte_ray.recipes.gpt:GPT", "package_f:Net", "package_g:Net"]
    assert str(raised.value).startswith("WORKER 'gpt' is the name of 3: lte_ray.recipes.gpt:GPT, ")
    assert str(raised.value).endswith("Give the one that you mean.")


@pytest.mark.parametrize("name", ["gtp", "workers.gpt", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    """With the other forms, and a suggestion if one is near."""
    with pytest.raises(WorkerError) as raised:
        load_worker(name)
    known = f"a ready-made worker ({', '.join(RECIPES)}), package.module:Class or path/to/file.py:Class."
    assert str(raised.value).startswith(f"WORKER is {name!r}, but it must be {known}")
    assert str(raised.value).endswith("Did you mean gpt?") == (name == "gtp")


@pytest.mark.parametrize("name", ["net.py", "sub/net"])
def test_a_path_without_a_class_is_explained(name: str) -> None:
    """Such a text is no short name."""
    with pytest.raises(WorkerError, match=r"it must be package\.module:Class or path/to/file\.py:Class"):
        load_worker(name)


def test_a_file_in_a_jobs_folder_is_named_by_its_place_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray removes that folder after the job; other paths stay absolute."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_ab"
    (folder / "sub").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert absolute("sub/net.py:Net") == "sub/net.py:Net"
    assert absolute(f"{folder}/net.py:Net") == "net.py:Net"
    monkeypatch.chdir(tmp_path)
    assert absolute("net.py:Net") == f"{tmp_path}/net.py:Net"
    assert absolute("package.module:Net") == "package.module:Net"
