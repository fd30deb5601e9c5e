"""Settings written the authors' way: ``config.lora.lora_r = 8``, ``config.lora.linear["lora_alpha"] = 32``.

Their configuration is a tree that is changed after it was made. Programs written for it go on working through these
views; new programs give settings to the constructor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lte_ray.config.layer_rules import KINDS, LayerConfig, rules, written
from lte_ray.config.validation import near
from lte_ray.errors import ConfigError

if TYPE_CHECKING:
    from lte_ray.config.lora import LTEConfig


class _NoSetting(ConfigError, AttributeError):
    """There is no setting of this name; `hasattr` takes it for an answer."""


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
    """``config.lora``: reads and sets the settings of `config`, which are checked again."""

    def __init__(self, config: LTEConfig) -> None:
        object.__setattr__(self, "_config", config)

    def keys(self) -> tuple[str, ...]:
        return tuple(type(self._config).__dataclass_fields__)

    def clone(self) -> LoraView:
        """The view of a copy."""
        return LoraView(dataclasses.replace(self._config))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy and pickle ask for
            raise AttributeError(name)
        if name in KINDS:
            return KindView(vars(self)["_config"], name)
        return _shown(name, getattr(self._config, _known(name, self.keys(), "lora")))

    def __setattr__(self, name: str, value: Any) -> None:
        _set(self._config, _known(name, self.keys(), "lora"), value)


class KindView(_View):
    """``config.lora.linear``: reads and sets what differs for one kind of layers."""

    def __init__(self, config: LTEConfig, kind: str) -> None:
        object.__setattr__(self, "_target", (config, kind))

    def keys(self) -> tuple[str, ...]:
        return tuple(LayerConfig.__dataclass_fields__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        config, kind = vars(self)["_target"]
        _known(name, self.keys(), f"lora.{kind}")
        own = {"lr": 1.0, "adapt": kind in config.adapt}
        value = own[name] if name in own else getattr(config, name)
        for rule in rules(config.layers):
            if rule.kind == kind and getattr(rule.settings, name) is not None:
                value = getattr(rule.settings, name)
        return _shown(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        config, kind = vars(self)["_target"]
        if name == "lora_bias" and isinstance(value, bool):
            value = "lora" if value else "frozen"
        (text,) = written({f"@{kind}": {name: value}})
        kept = [rule for rule in config.layers if not rule.startswith(f"@{kind}: {name}=") or rule.count("=") > 1]
        # Behind the rules for this kind, which it is to change, and before those for single layers, which win.
        at = max((i + 1 for i, rule in enumerate(rules(tuple(kept))) if rule.kind == kind), default=0)
        _set(config, "layers", (*kept[:at], text, *kept[at:]))


def _shown(name: str, value: Any) -> Any:
    """A value as their programs test it: ``if config.lora.lora_bias``."""
    return {"frozen": False, "lora": True}.get(value, value) if name == "lora_bias" else value


def _known(name: str, names: Iterable[str], where: str) -> str:
    if name not in names:
        raise _NoSetting(f"There is no setting {where}.{name}.{near(name, names)} There are: {', '.join(names)}.")
    return name


def _set(config: LTEConfig, name: str, value: Any) -> None:
    """Sets one field of a frozen config, or leaves it as it was if the value is refused."""
    before = getattr(config, name)
    object.__setattr__(config, name, value)
    try:
        config.__post_init__()
    except ConfigError:
        object.__setattr__(config, name, before)
        raise
