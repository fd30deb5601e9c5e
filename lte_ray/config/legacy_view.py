"""The mutable view of a config that programs for the authors' library use: ``config.lora.lora_r = 8``.

In their library a configuration is a tree that is changed after it was made, down to ``config.lora.linear["lora_alpha"] = 32``.
Here configs are frozen. Only `_assign` changes one in place, and only these views call it. New programs pass settings to the
constructor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Protocol

from lte_ray.config.layer_rules import KINDS, LayerConfig, format_rules, parse_rules
from lte_ray.config.validation import suggest
from lte_ray.errors import ConfigError


class Config(Protocol):
    """What a view needs of the config that it shows: a frozen dataclass that checks itself (`lora.LTEConfig`)."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def adapt(self) -> tuple[str, ...]: ...

    @property
    def layers(self) -> tuple[str, ...]: ...

    def __post_init__(self) -> None: ...


class UnknownSetting(ConfigError, AttributeError):
    """A view has no setting of this name. As an AttributeError it makes `hasattr` return False."""


class _View:
    """Settings by attribute and by key, as in a dict."""

    def keys(self) -> tuple[str, ...]:
        """The settings' names."""
        raise NotImplementedError

    def items(self) -> list[tuple[str, Any]]:
        """Names and values."""
        return [(name, self[name]) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or `default` if there is none of this name."""
        return getattr(self, name, default)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"


class LoraView(_View):
    """``config.lora``: reads and sets the settings of `config`, which checks itself again after each change."""

    def __init__(self, config: Config) -> None:
        object.__setattr__(self, "_config", config)

    def keys(self) -> tuple[str, ...]:
        return tuple(type(self._config).__dataclass_fields__)

    def clone(self) -> LoraView:
        """The view of a copy."""
        return LoraView(copy.copy(self._config))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle look for such names
            raise AttributeError(name)
        if name in KINDS:
            return KindView(vars(self)["_config"], name)
        return _as_authors(name, getattr(self._config, _check_known(name, self.keys(), "lora")))

    def __setattr__(self, name: str, value: Any) -> None:
        _assign(self._config, _check_known(name, self.keys(), "lora"), value)


class KindView(_View):
    """``config.lora.linear``: reads and sets what differs for one kind of layers."""

    def __init__(self, config: Config, kind: str) -> None:
        object.__setattr__(self, "_target", (config, kind))

    def keys(self) -> tuple[str, ...]:
        return tuple(LayerConfig.__dataclass_fields__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        config, kind = vars(self)["_target"]
        _check_known(name, self.keys(), f"lora.{kind}")
        per_kind = {"lr": 1.0, "adapt": kind in config.adapt}
        value = per_kind[name] if name in per_kind else getattr(config, name)
        for rule in parse_rules(config.layers):
            if rule.kind == kind and getattr(rule.settings, name) is not None:
                value = getattr(rule.settings, name)
        return _as_authors(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        config, kind = vars(self)["_target"]
        if name == "lora_bias" and isinstance(value, bool):
            value = "lora" if value else "frozen"
        (text,) = format_rules({f"@{kind}": {name: value}})
        kept = [rule for rule in config.layers if not rule.startswith(f"@{kind}: {name}=") or rule.count("=") > 1]
        # After the rules for this kind, which it must override, and before those for single layers, which win.
        at = max((i + 1 for i, rule in enumerate(parse_rules(tuple(kept))) if rule.kind == kind), default=0)
        _assign(config, "layers", (*kept[:at], text, *kept[at:]))


def _as_authors(name: str, value: Any) -> Any:
    """A value as the authors' programs test it: ``if config.lora.lora_bias``."""
    return {"frozen": False, "lora": True}.get(value, value) if name == "lora_bias" else value


def _check_known(name: str, names: Iterable[str], where: str) -> str:
    if name not in names:
        raise UnknownSetting(f"There is no setting {where}.{name}.{suggest(name, names)} The settings are: {', '.join(names)}.")
    return name


def _assign(config: Config, name: str, value: Any) -> None:
    """Sets one field of a frozen config, and restores it if the config rejects the value."""
    before = getattr(config, name)
    object.__setattr__(config, name, value)
    try:
        config.__post_init__()
    except ConfigError:
        object.__setattr__(config, name, before)
        raise
