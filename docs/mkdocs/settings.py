"""Shows the help text of each setting as its docstring in the reference: it stands in the field's metadata."""

from __future__ import annotations

import dataclasses
from typing import Any

import griffe

import lte_ray.config


class Settings(griffe.Extension):
    """Gives the fields of all settings classes their defaults and help texts."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Fills them in once the package is read."""
        for section in lte_ray.config.SECTIONS:
            documented = pkg[f"{section.__module__.removeprefix('lte_ray.')}.{section.__name__}"]
            for field in dataclasses.fields(section):
                attribute = documented[field.name]
                attribute.value = repr(field.default)
                attribute.docstring = griffe.Docstring(field.metadata["help"], parent=attribute)
