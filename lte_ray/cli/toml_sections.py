"""Sections of settings files: tables with the titles of the help, in files for ``--config`` and from ``--print-config``."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

import tomli_w

from lte_ray.config import suggest
from lte_ray.config.toml import NONE
from lte_ray.errors import ConfigError
from lte_ray.redaction import is_sensitive

OTHER_TABLES = ("worker", "policy_args")
"""Tables that aren't sections of settings: the worker's own, and the merge policy's."""

HIDDEN = "policy_args"


def flatten(where: str, content: Mapping[str, Any], titles: Mapping[type, str]) -> dict[str, Any]:
    """Returns the settings of a file without its sections. Settings outside sections stay.

    Args:
        where: the file, for messages.
        titles: the settings classes and their sections.

    Raises:
        ConfigError: a section is unknown, a setting is in a wrong one, or stands twice.
    """
    fields = {title: {f.name for f in dataclasses.fields(kind)} for kind, title in titles.items()}
    home = {name: title for title, names in fields.items() for name in names}
    flat = {name: value for name, value in content.items() if not isinstance(value, dict) or name not in fields}
    for title, table in content.items():
        if not isinstance(table, dict) or title in OTHER_TABLES or title in home:
            continue
        if title not in fields:
            known = ", ".join(f"[{each}]" for each in (*fields, *OTHER_TABLES))
            hint = suggest(title, fields) or f" Sections are: {known}."
            raise ConfigError(f"{where} has an unknown section [{title}].{hint} Settings may also stand without a section.")
        for name, value in table.items():
            if name not in fields[title]:
                belongs = f" It belongs in [{home[name]}]." if name in home else suggest(name, fields[title])
                problem = "the setting" if name in home else "an unknown setting"
                raise ConfigError(f"{where}: [{title}] has {problem} {name}.{belongs}")
            if name in flat:
                raise ConfigError(f"{where} has {name} twice: in [{title}] and without a section. Remove one of them.")
            flat[name] = value
    return flat


def format_settings(sections: Mapping[type, Any], titles: Mapping[type, str], program: str, worker: Any) -> str:
    """Returns the settings as a commented file for ``--config``.

    Args:
        sections: the settings by their class.
        titles: their sections.
        program: the worker, as the command line names it, for the first line.
        worker: the worker, for its own settings; None if it has none.
    """
    from lte_ray.run.record import format_record, recorded_arguments

    lines = [f"# Settings of {program}. A part of these lines is enough: the other settings have their defaults."]
    for kind, title in titles.items():
        lines += ["", f"[{title}]"]
        for field in dataclasses.fields(kind):
            if field.name != HIDDEN:
                lines += textwrap.wrap(field.metadata["help"], 98, initial_indent="# ", subsequent_indent="# ")
                lines.append(_line(field.name, getattr(sections[kind], field.name)))
    policy = next((dict(args) for section in sections.values() if (args := getattr(section, HIDDEN, None))), {})
    table, omitted = recorded_arguments(worker) if worker is not None else ({}, [])
    for name, values in ((HIDDEN, policy), ("worker", table)):
        if values:
            plain = {key: NONE if value is None else value for key, value in values.items()}
            lines += ["", format_record({name: plain}).rstrip()]
    lines += [f"# worker.{name} is a secret: give it as a flag." for name in omitted]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    if is_sensitive(name, value):
        return f"# {name} is a secret: give it as a flag."
    shown = f"[{', '.join(map(_scalar, value))}]" if isinstance(value, list | tuple) else _scalar(value)
    return f"{name} = {shown}"


def _scalar(value: Any) -> str:
    plain = NONE if value is None else value if isinstance(value, bool | int | float | str) else str(value)
    return tomli_w.dumps({"x": plain}).removeprefix("x = ").rstrip("\n")
