"""What a run records of itself: ``run.toml``, written first (`run.run_toml` reads it), its files, and its model."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import tempfile
import traceback
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import safetensors.torch
import tomli_w
from torch import Tensor

from lte_ray.config import FailureConfig, PlacementConfig, StorageConfig
from lte_ray.config.toml import DATA, NONE
from lte_ray.engine.prepare import Initial, merged_state_dict
from lte_ray.engine.settings import Settings
from lte_ray.errors import UserError, WorkerError
from lte_ray.import_object import absolute
from lte_ray.merging.registry import stable_name
from lte_ray.redaction import OMITTED, redact, split_secrets, without_credentials
from lte_ray.storage import EMA_MODEL, FILES, MODEL, RunDirectory
from lte_ray.worker import worker_settings


def make_record(
    worker: Any,
    program: str | None,
    settings: Settings,
    placement: PlacementConfig,
    storage: StorageConfig,
    failure: FailureConfig,
) -> dict[str, Any]:
    """Returns all settings of a run, flat, as ``--config run.toml`` takes them; the worker's own are under "worker".

    Secrets (`lte_ray.redaction`) are left out: "omitted" lists those that must be given again, and the storage's URI has none.
    """
    place = without_credentials(storage.storage) if storage.storage else None
    place = os.path.abspath(place) if place and "://" not in place else place
    storage = dataclasses.replace(storage, name=settings.run, storage=place, resume=False, overwrite=False)
    flat: dict[str, Any] = {"program": absolute(program or object_name(type(worker)))}
    for section in (settings.lte, settings.merge, settings.train, placement, failure, storage):
        flat |= {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    flat["callback"] = tuple(absolute(spec) for spec in settings.train.callback)
    init_from = flat["init_from"]
    if init_from and os.path.exists(init_from):  # so that the run can be resumed from another folder
        flat["init_from"] = os.path.abspath(init_from)
    if storage.keep_checkpoints is None:
        flat["keep_checkpoints"] = NONE
    of_worker, worker_secrets = recorded_arguments(worker)
    of_policy, policy_secrets = split_secrets(settings.merge.policy_args or {}, {})
    if worker_secrets or policy_secrets:
        names = [*(f"worker.{name}" for name in worker_secrets), *(f"policy.{name}" for name in policy_secrets)]
        flat[OMITTED] = names
    if (described := described_data(worker)) is not None:
        flat[DATA] = described
    flat["log"] = [absolute(name) for name in storage.log]
    flat |= {"policy": absolute(object_name(settings.merge.policy)), "policy_args": _as_flag_values(of_policy)}
    return {**flat, "worker": of_worker}


def recorded_arguments(worker: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the worker's own settings as ``run.toml`` takes them, and the names of those left out since they are secrets."""
    arguments = _recordable(type(worker), worker_settings(worker))
    kept, secrets = split_secrets(arguments, _defaults(type(worker)))
    return _as_flag_values(kept), secrets


def described_data(worker: Any) -> str | None:
    """Returns what the worker's `describe_data` says of its training data; None if it has no such method.

    Raises:
        WorkerError: it raised.
    """
    describe = getattr(worker, "describe_data", None)
    if describe is None:
        return None
    try:
        return str(describe())
    except UserError:
        raise
    except Exception as error:
        raise WorkerError(f"{type(worker).__name__}.describe_data() raised:\n\n{traceback.format_exc()}") from error


def write_model(directory: RunDirectory, initial: Initial, base: Tensor, ema: Tensor | None = None) -> None:
    """Writes the merged weights, and their moving average if there is one, under the unconverted model's own names."""
    for name, weights in ((MODEL, base), (EMA_MODEL, ema)):
        if weights is not None:
            state = merged_state_dict(initial.model, initial.plan, weights)
            directory.write(name, safetensors.torch.save(state, {"format": "pt"}))
    if ema is None and directory.exists(EMA_MODEL):
        directory.delete(EMA_MODEL)  # of an earlier part of the run, which had an average


def write_files(directory: RunDirectory, worker: Any) -> None:
    """Writes what the worker's `save_files` gives into the run's folder of files; nothing if it has no such method.

    Raises:
        WorkerError: it raised.
    """
    save = getattr(worker, "save_files", None)
    if save is None:
        return
    with tempfile.TemporaryDirectory() as place:
        try:
            save(Path(place))
        except UserError:
            raise
        except Exception as error:
            raise WorkerError(f"{type(worker).__name__}.save_files() raised:\n\n{traceback.format_exc()}") from error
        for path in sorted(Path(place).rglob("*")):
            if path.is_file():
                directory.write(f"{FILES}/{path.relative_to(place).as_posix()}", path.read_bytes())


def copy_files(directory: RunDirectory, folder: Path, inside: str = "") -> None:
    """Copies what `write_files` wrote into a local folder. Files that are there already stay."""
    for name in directory.list_names(f"{FILES}/{inside}".rstrip("/")):
        relative = f"{inside}/{name}".lstrip("/")
        if directory.size(f"{FILES}/{relative}") is None:
            copy_files(directory, folder, relative)
        elif not (folder / relative).exists():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            (folder / relative).write_bytes(directory.read(f"{FILES}/{relative}"))


def object_name(thing: Any) -> str:
    """How ``run.toml`` names a class, function or policy: a name as it is, anything else as module:Name."""
    if isinstance(thing, str):
        return thing
    kind = thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)
    return stable_name(f"{kind.__module__}:{kind.__qualname__}")


def _defaults(kind: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def _recordable(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that have a default which TOML can't hold (a function, a type, a table ...).

    They aren't recorded, since a resumed run has the same defaults.
    """
    return {name: value for name, value in values.items() if _is_plain(value) or not _is_default(kind, name, value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(each, str | int | float | Path) for each in value)
    return value is None or (isinstance(value, str | int | float | Path) and not isinstance(value, Enum))


def _is_default(kind: type, name: str, value: Any) -> bool:
    default = _defaults(kind).get(name)
    field = getattr(kind, "__dataclass_fields__", {}).get(name)
    try:
        if field is not None and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        return value is default or (type(value) is type(default) and bool(value == default))
    except Exception:  # a comparison of the worker's own may raise anything
        return False


def _as_flag_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with None and members of an Enum written as flags write them, and sets as lists."""
    return {name: _as_flag_value(value) for name, value in values.items()}


def _as_flag_value(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [_as_flag_value(each) if isinstance(each, Enum) else each for each in value]
    return NONE if value is None else value.name if isinstance(value, Enum) else value


def format_record(record: dict[str, Any]) -> str:
    """Returns the text of ``run.toml``."""
    return tomli_w.dumps(to_plain(record))


def to_plain(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the record as ``run.toml`` has it: tuples as lists, other objects as text, without values that are None."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            plain[key] = to_plain(value)
        elif isinstance(value, list | tuple):
            plain[key] = [v if isinstance(v, str | int | float | bool) else _as_text(v) for v in value]
        elif value is not None:
            plain[key] = value if isinstance(value, str | int | float | bool) else _as_text(value)
    return plain


def _as_text(value: Any) -> str:
    """An object's text without its address, which is another in each process."""
    return redact(re.sub(r" at 0x[0-9a-fA-F]+", "", str(value)))
