"""Settings written the authors' way: ``config.lora.lora_r = 8``, ``config.lora.linear.lora_alpha = 32``.

Their configuration is a tree that is changed after it was made. Programs written for it go on working through these
views; new programs give settings to the constructor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lte_ray.config.fields import near
from lte_ray.config.layers import KINDS, LayerConfig, rules, written
from lte_ray.errors import ConfigError

if TYPE_CHECKING:
    from lte_ray.config.heads import LTEConfig


class LoraView:
    """``config.lora``: reads and sets the settings of `config`, which are checked again."""

    def __init__(self, config: LTEConfig) -> None:
        object.__setattr__(self, "_config", config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy and pickle ask for
            raise AttributeError(name)
        if name in KINDS:
            return KindView(vars(self)["_config"], name)
        return getattr(self._config, _known(self._config, name))

    def __setattr__(self, name: str, value: Any) -> None:
        _set(self._config, _known(self._config, name), value)


class KindView:
    """``config.lora.linear``: reads and sets what differs for one kind of layers."""

    def __init__(self, config: LTEConfig, kind: str) -> None:
        object.__setattr__(self, "_target", (config, kind))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        config, kind = vars(self)["_target"]
        if name not in LayerConfig.__dataclass_fields__:
            raise ConfigError(f"There is no setting lora.{kind}.{name}.{near(name, LayerConfig.__dataclass_fields__)}")
        own = {"lr": 1.0, "adapt": kind in config.adapt}
        value = own[name] if name in own else getattr(config, name)
        for rule in rules(config.layers):
            if rule.kind == kind and getattr(rule.settings, name) is not None:
                value = getattr(rule.settings, name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        config, kind = vars(self)["_target"]
        if name == "lora_bias" and isinstance(value, bool):
            value = "lora" if value else "frozen"
        (text,) = written({f"@{kind}": {name: value}})
        kept = [rule for rule in config.layers if not rule.startswith(f"@{kind}: {name}=") or rule.count("=") > 1]
        # Behind the rules for this kind, which it is to change, and before those for single layers, which win.
        at = max((i + 1 for i, rule in enumerate(rules(tuple(kept))) if rule.kind == kind), default=0)
        _set(config, "layers", (*kept[:at], text, *kept[at:]))


def _known(config: LTEConfig, name: str) -> str:
    fields = type(config).__dataclass_fields__
    if name not in fields:
        raise ConfigError(f"There is no setting lora.{name}.{near(name, fields)} There are: {', '.join(fields)}.")
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
