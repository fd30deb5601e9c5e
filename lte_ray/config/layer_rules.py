"""Settings of single layers, written as rules.

A rule is ``PATTERN: key=value ...`` on the command line, in TOML and in Python, for example
``blocks.*.attn: lora_r=8 lora_bias=frozen``. A pattern matches layers by name, with wildcards, and everything below them;
``@conv`` matches all layers of a kind. If several rules match, later ones win, setting by setting.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lte_ray.config.validation import is_integer, suggest
from lte_ray.errors import ConfigError

KINDS = ("linear", "attention", "conv", "embedding", "norm")
"""Kinds of layers that can have factors."""

BIASES = ("replica", "frozen", "lora")
BASE_DTYPES = ("fp32", "bf16", "int8", "nf4")


@dataclass(frozen=True)
class LayerConfig:
    """The settings that differ for some layers. None keeps the setting that holds for all layers.

    Attributes:
        lora_r: rank, one number or one for each head.
        lora_alpha: alpha, one number or one for each head.
        lora_bias: "replica", "frozen" or "lora".
        lr: multiplier of the learning rate.
        base_dtype: format of the main weight in the heads.
        adapt: whether the layer has factors; if not, it trains as a replica.
    """

    lora_r: int | tuple[int, ...] | None = None
    lora_alpha: float | tuple[float, ...] | None = None
    lora_bias: str | None = None
    lr: float | None = None
    base_dtype: str | None = None
    adapt: bool | None = None

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return " ".join(f"{name}={_format_value(value)}" for name, value in values.items() if value is not None)


@dataclass(frozen=True)
class Rule:
    """One rule: `settings` for the layers that `pattern` matches."""

    pattern: str
    settings: LayerConfig

    @property
    def kind(self) -> str | None:
        """The kind of layers that the pattern names, or None if it is a name pattern."""
        return self.pattern.removeprefix("@") if self.pattern.startswith("@") else None


def format_rules(layers: Any) -> tuple[str, ...]:
    """Returns rules as strings, given strings or a mapping of patterns to LayerConfig or dict.

    Raises:
        ConfigError: `layers` has another type, or a rule can't be parsed.
    """
    if isinstance(layers, Mapping):
        texts = []
        for pattern, value in layers.items():
            unknown = [name for name in value if name not in _FIELDS] if isinstance(value, Mapping) else []
            if unknown:
                raise ConfigError(_unknown(unknown[0], f"{pattern}: {dict(value)}"))
            settings = LayerConfig(**value) if isinstance(value, Mapping) else value
            if not isinstance(settings, LayerConfig):
                raise ConfigError(f"--layers {pattern!r}: {settings!r} is neither a LayerConfig nor a dict of its settings.")
            texts.append(f"{pattern}: {settings}")
        layers = texts
    texts = list(layers) if isinstance(layers, Iterable) else []
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not all(isinstance(rule, str) for rule in texts):
        raise ConfigError(f"--layers is {layers!r}, but it must be a list of rules, 'PATTERN: key=value ...'.")
    parse_rules(tuple(texts))
    return tuple(texts)


@functools.lru_cache
def parse_rules(texts: tuple[str, ...]) -> tuple[Rule, ...]:
    """Parses rules. Raises ConfigError for one that can't be parsed."""
    return tuple(_parse_rule(text) for text in texts)


def value_for_head(value: Any, head: int) -> Any:
    """The value for one head of a setting that is one number, or one per head."""
    return value[head] if isinstance(value, tuple) else value


def check_rank(name: str, value: Any, num_heads: int) -> None:
    """Raises ConfigError unless it is a whole number above 0, or one per head."""
    _check_each(name, value, num_heads, lambda v: is_integer(v) and v > 0, "a whole number, at least 1")


def check_alpha(name: str, value: Any, num_heads: int) -> None:
    """Raises ConfigError unless it is a number above 0, or one per head."""
    _check_each(name, value, num_heads, lambda v: _is_number(v) and v > 0, "a number above 0")


def _check_each(name: str, value: Any, num_heads: int, is_valid: Any, what: str) -> None:
    if isinstance(value, tuple) and len(value) != num_heads:
        raise ConfigError(
            f"{name} has {len(value)} values {list(value)}, but --num-heads is {num_heads}: give one, or one per head."
        )
    for number in value if isinstance(value, tuple) else (value,):
        if not is_valid(number):
            raise ConfigError(f"{name} is {number!r}, but it must be {what}.")


def check_rules(texts: tuple[str, ...], num_heads: int) -> None:
    """Raises ConfigError if a rule's value is out of range."""
    for rule, text in zip(parse_rules(texts), texts, strict=True):
        s, where = rule.settings, f"--layers {text!r}:"
        if s.lora_r is not None:
            check_rank(f"{where} lora_r", s.lora_r, num_heads)
        if s.lora_alpha is not None:
            check_alpha(f"{where} lora_alpha", s.lora_alpha, num_heads)
        for name, known in (("lora_bias", BIASES), ("base_dtype", BASE_DTYPES)):
            value = getattr(s, name)
            if value is not None and value not in known:
                raise ConfigError(
                    f"{where} {name} is {value!r}, but it must be one of: {', '.join(known)}.{suggest(value, known)}"
                )
        if s.lr is not None and not (_is_number(s.lr) and s.lr >= 0):
            raise ConfigError(
                f"{where} lr is {s.lr!r}, but it must be a number, at least 0 (a multiplier of the learning rate)."
            )
        if rule.kind is not None and rule.kind not in KINDS:
            raise ConfigError(f"{where} {rule.kind!r} isn't a kind of layers; the kinds are: {', '.join(KINDS)}.")


_FIELDS = {f.name: f for f in dataclasses.fields(LayerConfig)}


def _parse_rule(text: str) -> Rule:
    pattern, colon, rest = text.rpartition(":")
    if not colon or not pattern.strip() or not rest.split():
        raise ConfigError(f"--layers {text!r} isn't a rule 'PATTERN: key=value ...', e.g. 'blocks.*: lora_r=8 lr=0.5'.")
    values = {}
    for part in rest.split():
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--layers {text!r}: {part!r} isn't key=value.")
        if name not in _FIELDS:
            raise ConfigError(_unknown(name, text))
        values[name] = _parse_value(name, value, text)
    return Rule(pattern.strip(), LayerConfig(**values))


def _unknown(name: Any, text: str) -> str:
    return (
        f"--layers {text!r}: there is no setting {name!r}.{suggest(str(name), _FIELDS)} The settings are: {', '.join(_FIELDS)}."
    )


def _parse_value(name: str, text: str, rule: str) -> Any:
    if name in ("lora_bias", "base_dtype"):
        return text
    if name == "adapt":
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"--layers {rule!r}: adapt is {text!r}, but it must be true or false.")
        return text.lower() == "true"
    kind = int if name == "lora_r" else float
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"--layers {rule!r}: {name} is {text!r}, but it must be {what}, or one per head: 8,8,32.") from None
    if name == "lr" and len(numbers) > 1:
        raise ConfigError(f"--layers {rule!r}: lr is {text!r}, but it must be one number.")
    return numbers if len(numbers) > 1 else numbers[0]


def _format_value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
