"""Conditions on a figure that end a run early, as ``--stop-when`` gives them."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lte_ray.errors import ConfigError

TRAIN_LOSS = "train_loss"
"""The name of the training loss in a condition; any other name is that of a figure of the evaluation."""

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}

_FORM = re.compile(r"\s*(?P<name>[^<>=]*[^<>=\s])\s*(?P<operator><=|>=|<|>)\s*(?P<limit>[^<>=\s]+)\s*")


@dataclass(frozen=True)
class Condition:
    """A condition on a figure: its name, one of < <= > >=, and a number."""

    name: str
    operator: str
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a value of the figure meets it. NaN never does."""
        return _OPERATORS[self.operator](value, self.limit)


def parse_condition(text: str) -> Condition:
    """Reads a condition such as ``loss<2.3`` or ``accuracy >= 0.9``.

    Raises:
        ConfigError: it has another form.
    """
    match = _FORM.fullmatch(text) if isinstance(text, str) else None
    try:
        limit = float(match["limit"]) if match else math.nan
    except ValueError:
        limit = math.nan
    if match is None or not math.isfinite(limit):
        raise ConfigError(
            f"--stop-when is {text!r}, but it must be a figure, one of < <= > >=, and a number, such as 'loss<2.3'. In a shell "
            "it needs quotes."
        )
    return Condition(match["name"], match["operator"], limit)
