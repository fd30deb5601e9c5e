"""The flags of ``lte-ray train``, made from the settings classes: one definition for flags, TOML file and Python."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any

import tyro

from lte_ray.config import (
    SECTIONS,
    LTEConfig,
    MergeConfig,
    PlacementConfig,
    StorageConfig,
    TrainConfig,
    flag,
    near,
)
from lte_ray.errors import ConfigError, WorkerError

TITLES = {
    LTEConfig: "heads",
    MergeConfig: "merging",
    TrainConfig: "training",
    PlacementConfig: "resources",
    StorageConfig: "run",
}


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What the command line and the TOML file say, validated."""

    lte: LTEConfig
    merge: MergeConfig
    train: TrainConfig
    placement: PlacementConfig
    storage: StorageConfig
    worker: Any


def parse(worker: type | None, program: str, arguments: list[str]) -> Parsed:
    """Parses flags, with those of the TOML file that ``--config`` names standing before them.

    Prints help and exits with 0 for ``--help``; prints what is wrong and exits with 2 for an unknown flag or a value of
    the wrong type.

    Raises:
        ConfigError: a value is out of range, or the TOML file is missing, malformed or has unknown keys.
        WorkerError: the worker's constructor has parameters that can't be flags, or raised.
    """
    config, rest = _take_config(arguments)
    preset = _toml_arguments(config, worker) if config else []
    try:
        flags: Any = tyro.cli(_flags_class(worker), prog=f"lte-ray train {program}", args=[*preset, *rest], description=_ABOUT)
    except tyro.constructors.UnsupportedTypeAnnotationError as error:
        raise WorkerError(f"{program}: the constructor's parameters can't all be flags; annotate them: {error}") from error
    except ConfigError:
        raise
    except Exception as error:
        raise WorkerError(f"{program} could not be made: {type(error).__name__}: {error}") from error
    made = {title: _plain(kind, getattr(flags, title)) for kind, title in TITLES.items()}
    return Parsed(
        made["heads"], made["merging"], made["training"], made["resources"], made["run"], getattr(flags, "worker", None)
    )


_ABOUT = (
    "Trains WORKER with LoRA heads that are Ray actors. Flags may also stand in a TOML file, under the same names with "
    "underscores (num_heads = 4) and the worker's own in a table [worker]: --config FILE.toml. Flags win over the file."
)


def _flags_class(worker: type | None) -> type:
    sections: list[tuple[str, Any]] = []
    for kind in SECTIONS:
        hints = typing.get_type_hints(kind)
        fields = [
            (
                f.name,
                Annotated[str if hints[f.name] is Any else hints[f.name], tyro.conf.arg(help=f.metadata["help"])],
                dataclasses.field(default=f.default),
            )
            for f in dataclasses.fields(kind)
        ]
        section = dataclasses.make_dataclass(f"{kind.__name__}Flags", fields)
        section.__doc__ = (kind.__doc__ or "").split("``")[0].strip()
        sections.append((TITLES[kind], Annotated[section, tyro.conf.arg(name="")]))
    if worker is not None and inspect.signature(worker).parameters:
        sections.append(("worker", worker))
    return tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(dataclasses.make_dataclass("Flags", sections))


def _plain(kind: type, section: Any) -> Any:
    return kind(**{f.name: getattr(section, f.name) for f in dataclasses.fields(kind)})


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    rest, config = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config = next(remaining, None)
            if config is None:
                raise ConfigError("--config needs a file: --config FILE.toml.")
        elif argument.startswith("--config="):
            config = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return (Path(config) if config is not None else None), rest


def _toml_arguments(path: Path, worker: type | None) -> list[str]:
    """The file's settings as flags, so that they are checked just like flags."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} can't be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} isn't valid TOML: {error}.") from error
    if content.pop("program", None) is not None:  # a run.toml: its settings for another run
        content.pop("name", None)
    own = content.pop("worker", {})
    if not isinstance(own, dict):
        raise ConfigError(f"--config {path}: worker must be a table [worker] of the worker's own settings.")
    known = {f.name: f.default for kind in SECTIONS for f in dataclasses.fields(kind)}
    theirs = {name: p.default for name, p in inspect.signature(worker).parameters.items()} if worker else {}
    arguments: list[str] = []
    for prefix, values, names in (("", content, known), ("worker.", own, theirs)):
        for name, value in values.items():
            if name not in names:
                hint = near(name, names) or f" Known are: {', '.join(sorted(names)) or 'none'}."
                raise ConfigError(f"--config {path} has an unknown setting {prefix}{name}.{hint}")
            arguments += _as_arguments("--" + prefix, flag(name)[2:], value, names[name])
    return arguments


def _as_arguments(prefix: str, name: str, value: Any, default: Any) -> list[str]:
    if isinstance(value, bool) and isinstance(default, bool):
        return [] if value == default else [prefix + name if value else f"{prefix}no-{name}"]
    if isinstance(value, list):
        return [prefix + name, *map(str, value)] if value or default else []
    return [prefix + name, str(value)]
