"""The flags of ``lte-ray train`` and ``simulate``, made from the settings classes, which also serve TOML and Python."""

from __future__ import annotations

import dataclasses
import inspect
import select
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from lte_ray.cli import toml_config
from lte_ray.cli.policy_flags import TABLE, chosen_policy, given_arguments, policy_section
from lte_ray.config import SECTIONS, FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.errors import ConfigError, WorkerError

TITLES: Mapping[type, str] = {
    LTEConfig: "heads",
    MergeConfig: "merging",
    TrainConfig: "training",
    PlacementConfig: "resources",
    FailureConfig: "failures",
    StorageConfig: "run",
}


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What the command line and the TOML file say, validated."""

    lte: LTEConfig
    merge: MergeConfig
    train: TrainConfig
    placement: PlacementConfig
    failure: FailureConfig
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
    made, own = parse_sections(worker, program, arguments, TRAIN)
    lte, merge, train, placement, failure, storage = (made[kind] for kind in SECTIONS)
    return Parsed(lte, merge, train, placement, failure, storage, own)


@dataclasses.dataclass(frozen=True)
class Face:
    """A subcommand that has settings: its name, what ``--help`` says first, and its settings classes with their titles."""

    command: str
    about: str
    titles: Mapping[type, str]


def parse_sections(worker: type | None, program: str, arguments: list[str], face: Face) -> tuple[dict[type, Any], Any]:
    """The settings of each of a subcommand's classes, and the worker, or None if it has no settings of its own.

    As `parse`, which it does the work of. What the TOML file says of other classes' settings is left aside.
    """
    config, rest = _take_config(arguments)
    content = toml_config.read(config) if config else {}
    policy = chosen_policy(rest, content)
    preset = toml_config.as_arguments(config, content, worker, policy, face.titles, rest) if config else []
    made_of = _flags_class(worker, policy, face)
    try:
        flags: Any = tyro.cli(made_of, prog=f"lte-ray {face.command} {program}", args=[*preset, *rest], description=face.about)
    except tyro.constructors.UnsupportedTypeAnnotationError as error:
        raise WorkerError(f"{program}: the constructor's parameters can't all be flags; annotate them: {error}") from error
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():  # the help to its end
            raise
        raise _not_made(program, error) from error
    own: dict[type, dict[str, Any]] = {MergeConfig: {TABLE: given_arguments(flags)}}
    made = {kind: _plain(kind, getattr(flags, title), own.get(kind, {})) for kind, title in face.titles.items()}
    return made, getattr(flags, "worker", None)


def nobody_reads() -> bool:
    """Whether standard output leads to a process that has ended, as in `lte-ray train --help | head`."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def without_settings(program: str, kind: type) -> Any:
    """The worker that has no settings of its own. Raises WorkerError if it can't be made."""
    try:
        return kind()
    except Exception as error:
        raise _not_made(program, error) from error


def _not_made(program: str, error: Exception) -> WorkerError:
    return WorkerError(f"{program} could not be made: {type(error).__name__}: {error}")


_ABOUT = (
    "Trains WORKER with LoRA heads that are Ray actors. Flags may also stand in a TOML file, under the same names with "
    "underscores (num_heads = 4), the worker's own in a table [worker] and the merge policy's own in a table [policy_args]: "
    "--config FILE.toml. Flags win over the file."
)

TRAIN = Face("train", _ABOUT, TITLES)


def _flags_class(worker: type | None, policy: str, face: Face) -> type:
    sections: list[tuple[str, Any]] = []
    for kind, title in face.titles.items():
        hints = typing.get_type_hints(kind)
        fields = [
            (
                f.name,
                Annotated[str if hints[f.name] is Any else hints[f.name], tyro.conf.arg(help=f.metadata["help"])],
                dataclasses.field(default=f.default),
            )
            for f in dataclasses.fields(kind)
            if f.name != TABLE
        ]
        section = dataclasses.make_dataclass(f"{kind.__name__}Flags", fields)
        section.__doc__ = (kind.__doc__ or "").split("``")[0].strip()
        sections.append((title, Annotated[section, tyro.conf.arg(name="")]))
    own = policy_section(policy)
    if own is not None:
        sections.append(own)
    if worker is not None and inspect.signature(worker).parameters:
        sections.append(("worker", worker))
    return dataclasses.make_dataclass("Flags", sections)


def _plain(kind: type, section: Any, own: dict[str, Any]) -> Any:
    return kind(**own | {f.name: getattr(section, f.name) for f in dataclasses.fields(kind) if f.name not in own})


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    rest, config = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config = next(remaining, None)
            if config is None or config.startswith("--"):
                raise ConfigError("--config needs a file: --config FILE.toml.")
        elif argument.startswith("--config="):
            config = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return (Path(config) if config is not None else None), rest
