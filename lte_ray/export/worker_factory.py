"""Constructs the worker of a run from ``run.toml``."""

from __future__ import annotations

import inspect
from typing import Any

from lte_ray.config.toml import NONE, convert
from lte_ray.errors import WorkerError
from lte_ray.import_object import load_worker
from lte_ray.redaction import OMITTED, mask_secrets
from lte_ray.storage import RUN
from lte_ray.worker import check_worker, constructor_parameters


def make_worker(record: dict[str, Any], override: Any = None) -> Any:
    """Returns the worker that ``run.toml`` names, with its recorded settings.

    Args:
        record: the content of ``run.toml``.
        override: use this instead: a worker (returned as it is), a class, or module:Class.

    Raises:
        WorkerError: the worker can't be loaded or constructed, or lacks a method.
    """
    program = override or record.get("program", "")
    if isinstance(program, str):
        what = "--worker" if override else f"The worker that {RUN} names,"
        try:
            kind = load_worker(program, what=what)
        except WorkerError as error:
            if override:
                raise
            raise WorkerError(
                f"{error} Export from the folder in which the run was started, or say where the worker is now with --worker."
            ) from error
    else:
        kind = program
    check_worker(kind)  # before calling any of it: the name comes from a file
    return _instantiate(kind, record.get("worker", {}), record.get(OMITTED, [])) if inspect.isclass(kind) else kind


def _instantiate(kind: type, settings: Any, omitted_names: Any) -> Any:
    if not isinstance(settings, dict):
        raise WorkerError(f"The table [worker] of {RUN} is {settings!r:.80}, not a table of the worker's settings.")
    known = constructor_parameters(kind)
    named = [str(name).removeprefix("worker.") for name in omitted_names] if isinstance(omitted_names, list) else []
    omitted = [name for name in named if name in known]
    try:
        return kind(**{name: _convert(value, *known[name]) for name, value in settings.items() if name in known})
    except Exception as error:
        missing = [name for name in omitted if known[name][1] is inspect.Parameter.empty]
        if missing:
            raise WorkerError(
                f"{kind.__name__} needs {', '.join(missing)}, which {RUN} omits since it contains no secrets. Construct the "
                f"worker in Python and pass it: worker={kind.__name__}({missing[0]}=..., ...)."
            ) from error
        raise WorkerError(
            f"{kind.__name__} can't be constructed with the settings in {RUN}, {mask_secrets(settings)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _convert(value: Any, annotation: Any, default: Any) -> Any:
    """Converts a value from TOML, which has no None, tuples, sets, paths or Enums, to the parameter's type.

    Other values stay as they are: the constructor decides about them.
    """
    if value == NONE and default is None:
        return None
    if not isinstance(value, str | list):
        return value
    try:
        return convert(value, annotation)
    except ValueError:
        return value
