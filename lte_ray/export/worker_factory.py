"""The worker of a run, made again from what ``run.toml`` says."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from lte_ray.config.toml import NONE
from lte_ray.errors import WorkerError
from lte_ray.import_object import load_object
from lte_ray.redaction import OMITTED, mask_secrets
from lte_ray.storage import RUN
from lte_ray.worker import check_worker


def make_worker(record: dict[str, Any], override: Any = None) -> Any:
    """The worker that ``run.toml`` (`record`) names, with the settings that it had there.

    Args:
        given: instead of the one that it names: a worker (taken as it is), a class, or module:Class.

    Raises:
        WorkerError: it can't be loaded or made, or lacks a method.
    """
    program = override or record.get("program", "")
    if isinstance(program, str):
        what = "--worker" if override else f"The worker that {RUN} names,"
        try:
            kind = load_object(program, what=what, error=WorkerError)
        except WorkerError as error:
            if override:
                raise
            raise WorkerError(
                f"{error} Export from the folder in which the run was started, or say where the worker is now with --worker."
            ) from error
    else:
        kind = program
    check_worker(kind)  # before anything of it is called: whoever wrote run.toml chose the name
    return _instantiate(kind, record.get("worker", {}), record.get(OMITTED, [])) if inspect.isclass(kind) else kind


def _instantiate(kind: type, settings: Any, left_out: Any) -> Any:
    if not isinstance(settings, dict):
        raise WorkerError(f"The table [worker] of {RUN} is {settings!r:.80}, not a table of the worker's settings.")
    try:
        hints = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__)  # type: ignore[misc]
    except Exception:  # annotations that can't be resolved say nothing
        hints = {}
    known = inspect.signature(kind).parameters
    named = [str(name).removeprefix("worker.") for name in left_out] if isinstance(left_out, list) else []
    omitted = [name for name in named if name in known]
    try:
        return kind(**{n: _convert(hints.get(n), v, known[n].default) for n, v in settings.items() if n in known})
    except Exception as error:
        lacking = [name for name in omitted if known[name].default is inspect.Parameter.empty]
        if lacking:
            raise WorkerError(
                f"{kind.__name__} needs {', '.join(lacking)}, which {RUN} leaves out since it holds no secrets. Make the "
                f"worker in Python and give it: worker={kind.__name__}({lacking[0]}=..., ...)."
            ) from error
        raise WorkerError(
            f"{kind.__name__} can't be made with the settings in {RUN}, {mask_secrets(settings)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _convert(hint: Any, value: Any, default: Any) -> Any:
    """A value from TOML, which knows neither None, tuples, sets, paths nor Enums, as the worker's constructor has it."""
    options = _nested_types(hint)
    if value == NONE and (default is None or type(None) in options):
        return None
    if not isinstance(value, list):
        return _convert_one(options, value)
    kinds = [typing.get_origin(option) or option for option in options]
    made = [_convert_one(options, each) for each in value]
    return next((kind(made) for kind in kinds if kind in (list, tuple, set, frozenset)), made)


def _nested_types(hint: Any) -> list[Any]:
    """An annotation and all that stands in it, from outside to inside."""
    return [hint, *(option for inner in typing.get_args(hint) for option in _nested_types(inner))]


def _convert_one(options: list[Any], value: Any) -> Any:
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum) and str(value) in option.__members__:
            return option[str(value)]
    return Path(value) if isinstance(value, str) and Path in options and str not in options else value
