"""Pickles a worker or policy for other processes, also one whose class is defined in a notebook or a script."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import ray

from lte_ray.errors import WorkerError

_CACHE = type(functools.lru_cache(len))
_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())
_DISPATCHING: Any = functools.singledispatch(len)


def dumps(value: Any) -> bytes:
    """Pickles an object. Classes and functions of a notebook or script are sent by value, with the globals that they use.

    Raises:
        WorkerError: it can't be pickled; the error names the attribute or the global that prevents it.
    """
    try:
        return _dumps(value)
    except Exception as error:
        name = type(value).__name__
        reason = str(error.__cause__ or error).strip().removesuffix(".")
        raise WorkerError(f"{name} can't be sent to other processes: {_blame(value)}{reason}. {_advice(value)}") from error


class _Unportable(Exception):
    pass


class _Pickler(ray.cloudpickle.CloudPickler):  # type: ignore[misc]
    """Also sends caches, single dispatch functions and locks of modules that go by value. Each process gets a new one."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _CACHE) and not _is_importable(obj):
            parameters = obj.cache_parameters()
            return _new_cache, (parameters["maxsize"], parameters["typed"]), obj.__wrapped__, None, None, _fill_cache
        if isinstance(obj, FunctionType) and obj.__code__ is _DISPATCHING.__code__ and not _is_importable(obj):
            return _new_dispatch, (), dict(obj.registry), None, None, _fill_dispatch  # type: ignore[attr-defined]
        if isinstance(obj, _LOCK):
            return threading.Lock, ()
        if isinstance(obj, _RLOCK):
            return threading.RLock, ()
        if _is_of_main(obj) and isinstance(obj.__reduce_ex__(5), str):
            raise _Unportable(f"other processes have no module __main__ that holds it, and a {type(obj).__name__} has no value")
        return super().reducer_override(obj)


def _dumps(value: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def _is_of_main(obj: Any) -> bool:
    """Whether it is something of the script or notebook that is neither a class, nor a function, nor an instance of a class."""
    try:
        of_main = obj.__module__ == "__main__" and type(obj).__module__ != "__main__"
    except Exception:  # an object may raise anything
        return False
    return of_main and not isinstance(obj, type | FunctionType)


def _is_importable(obj: Any) -> bool:
    """Whether other processes get the same object by its module and name."""
    name = getattr(obj, "__module__", None)
    if name in (None, "__main__") or name in ray.cloudpickle.list_registry_pickle_by_value():
        return False
    value: Any = sys.modules.get(name)
    for part in obj.__qualname__.split("."):
        value = getattr(value, part, None)
    return value is obj


# Both are made empty and filled later, since what they call may refer to them.


def _new_cache(maxsize: int | None, typed: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return call.target(*args, **kwargs)  # type: ignore[attr-defined]

    return functools.lru_cache(maxsize, typed)(call)


def _fill_cache(cache: Any, wrapped: Callable[..., Any]) -> None:
    cache.__wrapped__.target = wrapped
    functools.update_wrapper(cache, wrapped)


def _new_dispatch() -> Any:
    return functools.singledispatch(len)


def _fill_dispatch(dispatch: Any, registry: dict[type, Callable[..., Any]]) -> None:
    for kind, function in registry.items():
        dispatch.register(kind, function)
    functools.update_wrapper(dispatch, registry[object])


# -- what prevents pickling --------------------------------------------------------------------------------------------


def _blame(value: Any) -> str:
    """Returns which attribute or global can't be pickled, as the beginning of a sentence; empty if that isn't known."""
    for name, each in getattr(value, "__dict__", {}).items():
        if not _can_pickle(each):
            return f"its attribute {name} is a {type(each).__name__}: "
    for name, each, module in _globals(value):
        if not _can_pickle(each):
            return f"its code uses {name}, a global of {module} that is a {type(each).__name__}: "
    return ""


def _advice(value: Any) -> str:
    if type(value).__module__ == "__main__":
        return (
            "Put the class into a file of its own and import it, or give it as path/to/file.py:Class: then each process makes "
            "its globals itself. Or open files, models and data in the methods that use them."
        )
    return "Keep settings only in its attributes; open files, models and data in the methods that use them."


def _can_pickle(value: Any) -> bool:
    with contextlib.suppress(Exception):
        _dumps(value)
        return True
    return False


def _globals(value: Any) -> Iterator[tuple[str, Any, str]]:
    """Yields the globals that an object's code uses: name, value, module. Only of code that goes by value; leaves only."""
    todo: list[Any] = [value if isinstance(value, FunctionType) else type(value)]
    seen: set[int] = set()
    while todo:
        thing = inspect.unwrap(todo.pop()) if callable(todo[-1]) else todo.pop()
        thing = getattr(thing, "__func__", None) or getattr(thing, "fget", None) or thing
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, type):
            todo += [*thing.__bases__, *vars(thing).values()] if thing.__module__ == "__main__" else []
        elif isinstance(thing, FunctionType) and thing.__module__ == "__main__":
            for name in _names(thing.__code__):
                if name not in thing.__globals__:
                    continue
                each = thing.__globals__[name]
                if isinstance(each, type | FunctionType | _CACHE):
                    todo.append(each)
                elif not isinstance(each, ModuleType):
                    yield name, each, thing.__module__


def _names(code: CodeType) -> set[str]:
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)
