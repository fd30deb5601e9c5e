"""Labels of nodes, as settings name them: ``KEY=VALUE``, with the values of Ray's label selectors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lte_ray.config.validation import flag
from lte_ray.errors import ConfigError

AUTO, ANY = "auto", "none"
"""The words that --coordinator-labels takes in addition to labels."""

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{{0,251}}[A-Za-z0-9])?/)?{_WORD}")
_VALUE = re.compile(rf"!?(?:{_WORD}|in\({_WORD}(?:,{_WORD})*\))")


def to_labels(config: object, *names: str) -> None:
    """Turns each named value, texts ``KEY=VALUE`` or a mapping, into a tuple of such texts.

    Raises:
        ConfigError: one isn't a label that Ray can look for.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, Mapping):
            value = tuple(f"{key}={wanted}" for key, wanted in value.items())
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise ConfigError(
                f"{flag(name)} is {value!r}, but it must be a list of labels such as 'ray.io/market-type=on-demand'."
            )
        object.__setattr__(config, name, tuple(text.replace(" ", "") for text in value))  # Ray takes spaces as part of a value


def parse_labels(name: str, texts: tuple[str, ...]) -> dict[str, str]:
    """Returns the label selector that the texts of a setting make, as Ray takes it.

    Raises:
        ConfigError: one isn't ``KEY=VALUE``, or two have the same key.
    """
    selector: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise ConfigError(
                f"{flag(name)} is {text!r}, but it must be KEY=VALUE, such as ray.io/market-type=on-demand. Other values that "
                "Ray takes: '!spot', 'in(a,b)', '!in(a,b)'."
            )
        if key in selector:
            raise ConfigError(f"{flag(name)} has {key} twice. For one of several values, write '{key}=in(a,b)'.")
        selector[key] = value
    return selector


def matches(selector: Mapping[str, str], labels: Mapping[str, Any]) -> bool:
    """Whether a node with these labels is one that Ray's label selector chooses. A node without a key has no value of it."""
    for key, wanted in selector.items():
        words = wanted.removeprefix("!")
        values = words[3:-1].split(",") if words.startswith("in(") else [words]
        if (labels.get(key) in values) == wanted.startswith("!"):
            return False
    return True
