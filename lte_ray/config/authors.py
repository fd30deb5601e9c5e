"""Settings written the authors' way: ``config.lora.lora_r = 8``, ``config.lora.linear.lora_alpha = 32``.

Their configuration is a tree that is changed after it was made. Programs written for it go on working through these
views; new programs give settings to the constructor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lte_ray.config.fields import near
from lte_ray.config.layers import KINDS
from lte_ray.errors import ConfigError

if TYPE_CHECKING:
    from lte_ray.config.heads import LTEConfig


class LoraView:
    """``config.lora``: reads and sets the settings of `config`, which are checked again."""

    def __init__(self, config: LTEConfig) -> None:
        object.__setattr__(self, "_config", config)

    def __getattr__(self, name: str) -> Any:
        if name in KINDS:
            return KindView(vars(self)["_config"], name)
        return getattr(self._config, _known(self._config, name))

    def __setattr__(self, name: str, value: Any) -> None:
        _set(self._config, _known(self._config, name), value)


class KindView:
    """``config.lora.linear``: sets what differs for one kind of layers."""

    def __init__(self, config: LTEConfig, kind: str) -> None:
        object.__setattr__(self, "_target", (config, kind))

    def __setattr__(self, name: str, value: Any) -> None:
        config, kind = vars(self)["_target"]
        if name == "lora_bias" and isinstance(value, bool):
            value = "lora" if value else "frozen"
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        _set(config, "layers", (f"@{kind}: {name}={text}", *config.layers))


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
