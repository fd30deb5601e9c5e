"""The sinks by name, checked and made before a run starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lte_ray.config.run import AUTO, NO_LOG, check_log_names
from lte_ray.errors import ConfigError
from lte_ray.import_object import is_object_path, load_object
from lte_ray.run.sinks.csv import CsvSink
from lte_ray.run.sinks.mlflow import MlflowSink
from lte_ray.run.sinks.protocol import Sink
from lte_ray.run.sinks.tensorboard import TensorBoardSink
from lte_ray.run.sinks.wandb import WandbSink

SINKS: Mapping[str, Callable[[], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "csv": CsvSink,
}
"""The sinks that need no Ray."""

PACKAGES: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "'lte-ray[wandb]'"),
    "mlflow": ("mlflow", "'lte-ray[mlflow]'"),
}
"""The module that a sink needs, and how to install it."""

METHODS = ("open", "row", "close")


def make_sinks(log: Sequence[Any], of_ray: Mapping[str, Callable[[], Sink]]) -> dict[str, Sink]:
    """Makes the sinks that ``--log`` names, or that are given as objects.

    Args:
        log: names, ``module:Class`` or ``path/to/file.py:Class``, and objects.
        of_ray: the sinks that need Ray, by name. "auto" includes them.

    Returns:
        The sinks by name.

    Raises:
        ConfigError: a sink isn't known, isn't installed, isn't logged in, or has no such methods.
    """
    check_log_names([name for name in log if isinstance(name, str)])
    known = {**SINKS, **of_ray}
    sinks: dict[str, Sink] = {}
    for entry in log:
        if entry == AUTO:
            names = [name for name in ("tensorboard", *of_ray) if name not in sinks and _is_installed(name)]
            sinks |= {name: known[name]() for name in names}
        elif isinstance(entry, str) and entry in known:
            _check_installed(entry)
            getattr(known[entry], "check", _nothing)()
            sinks[entry] = known[entry]()
        elif entry != NO_LOG:
            sink = _load(entry) if isinstance(entry, str) else entry
            _check_methods(sink, entry)
            sinks[_unused_name(type(sink).__name__, sinks)] = sink
    return sinks


def recordable_names(log: Sequence[Any]) -> tuple[str, ...]:
    """What ``run.toml`` has of `log`: names. Objects must be given again when the run is resumed."""
    return tuple(entry for entry in log if isinstance(entry, str)) or (NO_LOG,)


def _nothing() -> None: ...


def _is_installed(name: str) -> bool:
    return name not in PACKAGES or find_spec(PACKAGES[name][0]) is not None


def _check_installed(name: str) -> None:
    if not _is_installed(name):
        module, package = PACKAGES[name]
        raise ConfigError(
            f"--log {name} needs the package {module}, which isn't installed. Run pip install {package}, or leave {name} out."
        )


def _load(spec: str) -> Any:
    kind = load_object(spec, what="--log", error=ConfigError)
    if not is_object_path(spec) or not callable(kind):
        raise ConfigError(f"--log {spec!r} is a {type(kind).__name__}, but it must be a class.")
    try:
        return kind()
    except Exception as error:
        raise ConfigError(
            f"--log {spec!r}: making the sink without arguments raised {type(error).__name__}: {error}. In Python, "
            "LTETrainer(log=[...]) takes a sink that you have made."
        ) from error


def _check_methods(sink: Any, entry: Any) -> None:
    missing = [name for name in METHODS if not callable(getattr(sink, name, None))]
    if missing or isinstance(sink, type):
        what = "is a class, not an object of it" if isinstance(sink, type) else f"has no method {missing[0]}"
        shown = repr(entry) if isinstance(entry, str) else type(sink).__name__ if not isinstance(sink, type) else sink.__name__
        raise ConfigError(f"The sink {shown} {what}. A sink has the methods {', '.join(METHODS)} (lte_ray.Sink).")


def _unused_name(name: str, sinks: Mapping[str, Sink]) -> str:
    number, unused = 2, name
    while unused in sinks:
        number, unused = number + 1, f"{name}-{number}"
    return unused
