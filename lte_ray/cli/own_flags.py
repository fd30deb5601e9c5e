"""The flags ``--worker.NAME`` and ``--policy.NAME``: of the worker's constructor and of the merge policy's arguments, by tyro.

Their types are their authors' own, so that tyro makes these flags. What it prints is put into our words: its help becomes
entries of ours, and its complaints become one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lte_ray.cli.policy_flags import flag_type, parsed_arguments, policy_arguments, policy_section
from lte_ray.cli.settings_parser import describe_extra
from lte_ray.config import suggest, toml
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.redaction import MASK, is_sensitive

PREFIXES = ("--worker.", "--policy.")


class Entry(NamedTuple):
    """A flag in the help: its spellings, what stands for its value (empty for a switch), and its explanation."""

    options: list[str]
    metavar: str
    help: str


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The flags of settings, and those of the worker and the policy, each with its values."""
    ours: list[str] = []
    own: list[str] = []
    into = ours
    for argument in arguments:
        if argument.startswith("--") or argument == "-h":
            into = own if argument.startswith(PREFIXES) else ours
        into.append(argument)
    return ours, own


class OwnFlags:
    """The flags of one worker and one policy.

    Args:
        worker: its class; None if there is none.
        program: how the command line names the worker.
        policy: the merge policy's name.
        worker_defaults: values that replace the defaults of the constructor's parameters.
        policy_defaults: values that replace the defaults of the policy's arguments.

    Raises:
        ConfigError: there is no such policy, or it needs an argument that can't be a flag.
    """

    def __init__(
        self,
        worker: type | None,
        program: str,
        policy: str,
        worker_defaults: Mapping[str, Any],
        policy_defaults: Mapping[str, Any],
    ) -> None:
        self._worker, self._program, self._policy = worker, program, policy
        self._worker_defaults, self._policy_defaults = worker_defaults, policy_defaults
        self._policy_types = {a.name: (flag_type(a), a.default) for a in policy_arguments(policy).values()}
        self._worker_types: dict[str, tuple[Any, Any]] = {}
        if worker is not None and inspect.signature(worker).parameters:
            from lte_ray.worker import constructor_parameters

            self._worker_types = constructor_parameters(worker)

    def names(self) -> list[str]:
        """The flags, except those of parts of a worker's argument."""
        of_worker = [f"--worker.{name.replace('_', '-')}" for name in self._worker_types]
        return [*of_worker, *(f"--policy.{name.replace('_', '-')}" for name in self._policy_types)]

    def parse(self, arguments: list[str]) -> tuple[Any, dict[str, Any] | None]:
        """Makes the worker, if it has arguments, and returns it and the policy's arguments, None if it has none.

        Raises:
            ConfigError: a flag is unknown, or its value is missing or has the wrong type.
            WorkerError: the constructor's parameters can't be flags, or it raised.
        """
        flags_class = self._flags_class()
        self._check_names(arguments)
        if flags_class is None:
            return None, None
        flags = self._run(flags_class, arguments)
        return getattr(flags, "worker", None), parsed_arguments(flags)

    def help(self) -> list[tuple[str, list[Entry]]]:
        """The flags as groups with a title; those of parts of an argument in groups of their own."""
        flags_class = self._flags_class()
        if flags_class is None:
            return []
        import tyro

        output = io.StringIO()
        with _wide(), contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            self._guarded(lambda: tyro.cli(flags_class, args=["--help"]))
        titles = {"worker": f"the worker's own ({self._program})", "policy": f"of the merge policy {self._policy}"}
        return list(_read_help(output.getvalue(), titles))

    def _flags_class(self) -> type | None:
        """A dataclass with the policy's arguments and the worker, for tyro; None if they have none."""
        sections: list[tuple[str, Any]] = []
        of_policy = policy_section(self._policy, self._policy_defaults) if self._policy_types else None
        if of_policy is not None:
            sections.append(of_policy)
        if self._worker is not None and inspect.signature(self._worker).parameters:
            sections.append(("worker", _with_defaults(self._worker, self._worker_types, self._worker_defaults)))
        return dataclasses.make_dataclass("Flags", sections) if sections else None

    def _run(self, flags_class: type, arguments: list[str]) -> Any:
        import tyro

        output, printed = io.StringIO(), io.StringIO()
        try:
            with _wide(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(output):
                flags = self._guarded(lambda: tyro.cli(flags_class, args=arguments))
        except SystemExit:
            raise ConfigError(self._explain(output.getvalue() or printed.getvalue(), arguments)) from None
        sys.stdout.write(printed.getvalue())  # of the worker's constructor
        sys.stderr.write(output.getvalue())
        return flags

    def _guarded(self, call: Any) -> Any:
        """Runs tyro, whose other errors are those of the worker's constructor."""
        import tyro

        try:
            return call()
        except tyro.constructors.UnsupportedTypeAnnotationError as error:
            reason = f"the constructor's parameters can't all be flags; annotate them: {error}"
            raise WorkerError(f"{self._program}: {reason}") from error
        except ConfigError:
            raise
        except Exception as error:
            raise constructor_error(self._program, error) from error

    def _check_names(self, arguments: list[str]) -> None:
        """Raises ConfigError for a flag of an unknown name, and for an argument that no flag gives."""
        given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
        for name in given:
            prefix, _, rest = name.partition(".")
            known = self._worker_types if prefix == "--worker" else self._policy_types
            if prefix == "--worker" and self._worker is None:
                raise ConfigError(f"{name} needs a WORKER, whose argument it is.")
            first = rest.partition(".")[0].replace("-", "_")
            if first not in known and first.removeprefix("no_") not in known and not self._takes_any(prefix):
                flags = [f"{prefix}.{each.replace('_', '-')}" for each in known]
                hint = suggest(name, flags) or f" It has {'only ' + ', '.join(flags) if flags else 'none'}."
                if prefix == "--policy":
                    raise ConfigError(f"The policy {self._policy} has no argument {name}.{hint}")
                raise ConfigError(f"The worker {self._program} has no argument {name}.{hint}")
        self._check_complete("--policy", self._policy_types, self._policy_defaults, given)
        self._check_complete("--worker", self._worker_types, self._worker_defaults, given)

    def _check_complete(
        self, prefix: str, known: Mapping[str, tuple[Any, Any]], defaults: Mapping[str, Any], given: list[str]
    ) -> None:
        """Raises ConfigError if an argument without a default isn't given. Of an argument with parts, tyro knows."""
        for name, (annotation, default) in known.items():
            if default is not inspect.Parameter.empty or name in defaults or annotation is Any or _has_parts(annotation):
                continue
            flag = f"{prefix}.{name.replace('_', '-')}"
            if flag not in given and f"{prefix}.no-{flag.partition('.')[2]}" not in given:
                whose = f"The policy {self._policy}" if prefix == "--policy" else f"The worker {self._program}"
                raise ConfigError(f"{whose} needs {flag}: give {flag} VALUE.")

    def _takes_any(self, prefix: str) -> bool:
        if prefix != "--worker" or self._worker is None:
            return False
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self._worker).parameters.values())

    def _explain(self, text: str, arguments: list[str]) -> str:
        """One sentence for what tyro printed."""
        said = _first_paragraph(text)
        if found := re.match(r"Unrecognized options: (--[^\s,]+)", said):  # and no value, which may be a secret
            return f"{self._program} has no argument {found[1]}."
        if found := re.search(r"Unsupported type annotation for field ([\w.]+)", text):
            return f"{self._program}: the constructor's parameters can't all be flags; annotate them. {found[0]}."
        if found := re.match(r"Error parsing worker: (.*)", said):
            return f"{self._program} could not be constructed: {found[1]}"
        if found := re.match(r"Unrecognized options: (?!--)(\S+?)(,|$)", said):
            return describe_extra(found[1], arguments)
        if found := re.search(r"--(worker|policy)\.[\w-]+", said):
            types = self._worker_types if found[1] == "worker" else self._policy_types
            annotation = types.get(found[0].partition(".")[2].replace("-", "_"), (Any,))[0]
            values = _values(found[0], arguments)
            if not values:
                return f"{found[0]} needs a value."
            try:
                toml.convert(values[0] if len(values) == 1 else values, annotation)
            except ValueError as error:
                given = values[0] if len(values) == 1 else values
                shown = MASK if is_sensitive(found[0], given) else repr(given)
                return f"{found[0]} is {shown}, but it must be {error}."
        return said


def _has_parts(annotation: Any) -> bool:
    return isinstance(annotation, type) and annotation.__module__ != "builtins" and not issubclass(annotation, str | int)


def _values(flag: str, arguments: list[str]) -> list[str]:
    """The values that follow a flag."""
    values: list[str] = []
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
            if name == flag:
                values = [value] if value else []
        elif name == flag:
            values.append(argument)
    return values


def constructor_error(program: str, error: Exception) -> WorkerError:
    """The error for an exception of a worker's constructor."""
    return WorkerError(f"{program} could not be constructed: {type(error).__name__}: {error}")


def _with_defaults(worker: type, known: Mapping[str, tuple[Any, Any]], defaults: Mapping[str, Any]) -> Any:
    """The worker's constructor with other defaults, if there are some."""
    fields = dataclasses.fields(worker) if dataclasses.is_dataclass(worker) else ()
    if not defaults and (not fields or {f.name for f in fields if f.init} == set(known)):
        return worker  # a subclass of a dataclass may have a constructor of its own
    if fields:  # tyro would look for the names in annotations of a base class in the module of the worker
        resolved = worker.__init__.__annotations__  # type: ignore[misc]
        resolved.update({name: known[name][0] for name in resolved if known.get(name, (Any,))[0] is not Any})
    # In its signature a dataclass shows the default of a field with a factory as a placeholder.
    factory_defaults = {f.name: f.default_factory() for f in fields if f.init and f.default_factory is not dataclasses.MISSING}
    return functools.partial(worker, **factory_defaults | dict(defaults))


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Lines that don't wrap, and no colors, in what tyro prints."""
    names = {"COLUMNS": "4000", "NO_COLOR": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _lines(text: str) -> Iterator[str]:
    """What tyro printed, without frames and rules."""
    for line in text.splitlines():
        plain = line.strip().strip("│╭╮╰╯|").strip()
        if plain.strip("─- "):
            yield plain.strip("─ ")


def _first_paragraph(text: str) -> str:
    """The message in what tyro printed, without its title and its pointers to the help."""
    _, *lines = [*_lines(text), ""]
    end = next((i for i, line in enumerate(lines) if re.match(r"(For full helptext|Perhaps you meant|Similar )", line)), None)
    return " ".join(" ".join(lines[:end]).split()) or " ".join(text.split())


def _read_help(text: str, titles: Mapping[str, str]) -> Iterator[tuple[str, list[Entry]]]:
    title = ""
    entries: list[Entry] = []
    for line in _lines(text):
        if found := re.fullmatch(r"((worker|policy)\S*) options", line):
            if entries:
                yield title, entries
            title, entries = titles.get(found[1], f"--{found[1]}"), []
        elif line.startswith(("--worker.", "--policy.")):
            spelled, _, rest = line.partition("  ")
            options = re.findall(r"--[\w.-]+", spelled.split(" {")[0].split(" [")[0])
            metavar = spelled[spelled.rindex(options[-1]) + len(options[-1]) :].strip()
            entries.append(Entry(options, _readable(metavar), rest.strip()))
        elif entries:
            last = entries[-1]
            entries[-1] = last._replace(help=f"{last.help} {line}".strip())
    if entries:
        yield title, entries


def _readable(metavar: str) -> str:
    """``{None}|FLOAT`` as ``FLOAT or None``, ``INT|{[INT [INT ...]]}`` as ``INT [INT ...]``."""
    text = re.sub(r"\[(\w+) \[\1 \.\.\.\]\]", r"[\1 ...]", metavar)
    text = re.sub(r"(\w+)\|\{\[\1 \.\.\.\]\}", r"\1 [\1 ...]", text)
    text = re.sub(r"\{\[(\w+) \.\.\.\]\}", r"[\1 ...]", text)
    if text.startswith("{None}|"):
        text = f"{text.removeprefix('{None}|')} or None"
    return text.replace("|", " or ")
