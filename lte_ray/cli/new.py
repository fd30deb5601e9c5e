"""``lte-ray new``: writes a worker file to start from. Starts no Ray and loads no torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lte_ray.cli.settings_parser import parse_arguments, positional
from lte_ray.config import suggest
from lte_ray.config.validation import setting
from lte_ray.errors import StorageError, WorkerError
from lte_ray.import_object import from_entry_points, worker_names

TEMPLATE = "lte_ray.recipes.template:Template"


@dataclass(frozen=True)
class Flags:
    """Writes a worker into a new file: a commented one that runs as it is, or a copy of a ready-made one."""

    name: str = positional("NAME", "The file, with or without .py.")
    from_: str | None = setting(None, "The ready-made worker to copy, such as gpt or causal-lm.")


def new(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``new``.

    Raises:
        WorkerError: there is no such ready-made worker, or its source can't be read.
        StorageError: the file exists, or can't be written.
    """
    flags = parse_arguments(Flags, "lte-ray new NAME [flags]", arguments)
    path = Path(flags.name if flags.name.endswith(".py") else f"{flags.name}.py")
    text, name = _copied(flags.from_) if flags.from_ is not None else _commented(path.stem)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise StorageError(f"{path} exists already, and lte-ray new doesn't replace files. Choose another NAME.") from None
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}. Choose another NAME.") from error
    Console(highlight=False).print(f"{path} is written. Train it: lte-ray train {path}:{name}", markup=False, soft_wrap=True)


def _commented(stem: str) -> tuple[str, str]:
    """The commented worker and its name, which is made of the file's."""
    name = "".join(word.capitalize() for word in re.split(r"[^0-9A-Za-z]+", stem))
    name = name if name.isidentifier() else "Mine"
    text = re.sub(r"\bTemplate\b", name, _source(TEMPLATE))
    return text.replace(" `lte-ray new` copies it.", ""), name


def _copied(recipe: str) -> tuple[str, str]:
    """A ready-made worker's source, in which imports of its neighbors name their package; and its class."""
    names = worker_names()
    if recipe not in names:
        raise WorkerError(f"--from is {recipe!r}, but it must be one of: {', '.join(names)}.{suggest(recipe, names)}")
    spec = from_entry_points(recipe, names, what="--from", error=WorkerError)
    module, _, name = spec.partition(":")
    package = module.rpartition(".")[0]
    return re.sub(r"^from \.(\w+) import", rf"from {package}.\1 import", _source(spec), flags=re.MULTILINE), name


def _source(spec: str) -> str:
    """The source of the module that has a worker, which isn't imported."""
    module = spec.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except ImportError as error:
        raise WorkerError(f"{module} can't be found: {error}") from error
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise WorkerError(f"{module} has no source file that can be copied.")
    return Path(found.origin).read_text(encoding="utf-8")
